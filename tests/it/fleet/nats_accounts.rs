//! A NATS server that demands a JWT: an operator, an account with JetStream, and a user of it, made up for one test.

use std::path::{Path, PathBuf};

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

/// Files for the server and for those who come to it.
pub struct Accounts {
    pub server_config: PathBuf,
    pub credentials: PathBuf,
}

/// What `issuer` says of `subject`, signed.
fn jwt(issuer: &KeyPair, subject: &KeyPair, name: &str, claims: Value) -> String {
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let body = json!({
        "jti": name, "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject.public_key(), "name": name,
        "nats": claims,
    });
    let part = |value: Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let signed = format!("{}.{}", part(header), part(body));
    format!("{signed}.{}", BASE64URL_NOPAD.encode(&issuer.sign(signed.as_bytes()).unwrap()))
}

fn account(operator: &KeyPair, key: &KeyPair, name: &str, storage: i64) -> String {
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
        "leaf": -1, "mem_storage": storage, "disk_storage": storage, "streams": -1, "consumer": -1,
    });
    let claims = json!({ "type": "account", "version": 2, "limits": limits, "default_permissions": {} });
    jwt(operator, key, name, claims)
}

impl Accounts {
    pub fn make(folder: &Path) -> Self {
        let (operator, system, events, user) =
            (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account(), KeyPair::new_user());
        let operator_jwt = jwt(&operator, &operator, "operator", json!({ "type": "operator", "version": 2 }));
        let config = format!(
            "operator: {operator_jwt}\nsystem_account: {}\nresolver: MEMORY\n\
             resolver_preload: {{\n{}: {}\n{}: {}\n}}\n",
            system.public_key(),
            system.public_key(),
            account(&operator, &system, "system", 0),
            events.public_key(),
            account(&operator, &events, "events", -1),
        );
        let of_user = json!({
            "type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1,
        });
        let credentials = format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            jwt(&events, &user, "user", of_user),
            user.seed().unwrap(),
        );
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        Self { server_config: write("nats.conf", config), credentials: write("user.creds", credentials) }
    }
}
