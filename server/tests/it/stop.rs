//! One daemon per socket, and how it ends.

use std::os::unix::fs::PermissionsExt;

use kvbm_proto::v1::{self, Refusal, client_message::Body as Ask, server_message::Body};
use kvbm_server::{Daemon, StartError};
use tonic::Code;

use crate::client::{Client, keys, side_path};
use crate::rig::{Rig, config};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_socket_is_refused() {
    let rig = Rig::start(&[]).await;
    let error = Daemon::start(config(rig.dir.path(), &[])).await.unwrap_err();
    assert!(matches!(error, StartError::InUse { .. }), "{error}");
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    let socket = rig.socket().display();
    assert_eq!(text, format!("a daemon is already serving at {socket} (process {})", std::process::id()));
    Client::attach(rig.socket()).await.sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_of_a_dead_daemon_are_replaced_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let settings = config(dir.path(), &[]);
    drop(std::os::unix::net::UnixListener::bind(&settings.socket).unwrap());
    drop(std::os::unix::net::UnixListener::bind(side_path(&settings.socket)).unwrap());
    let rig = Rig { daemon: Daemon::start(settings.clone()).await.unwrap(), dir };
    for path in [settings.socket.clone(), side_path(&settings.socket)] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o660);
    }
    Client::attach(rig.socket()).await.sync().await;
    rig.daemon.stop().await;
    assert!(!settings.socket.exists() && !side_path(&settings.socket).exists());

    std::fs::write(&settings.socket, "precious").unwrap();
    let error = Daemon::start(settings.clone()).await.unwrap_err();
    assert!(matches!(error, StartError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&settings.socket).unwrap(), "precious");

    std::fs::remove_file(&settings.socket).unwrap();
    let _foreign = std::os::unix::net::UnixListener::bind(&settings.socket).unwrap();
    let error = Daemon::start(settings).await.unwrap_err();
    assert!(matches!(error, StartError::InUse { pid: None, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_answers_closed_lets_copies_end_and_ends_streams() {
    // Each block takes long enough that copies are in flight when the daemon is told to stop.
    let rig = Rig::start(&[("copy_delay_us", "50000"), ("batch_blocks", "2")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    client.store(namespace, &pool, &keys(0, 4)).await;
    let found = client.find(namespace, 0, &keys(0, 4)).await;
    let targets = client.grants(pool.id, 4).await;
    let onboard = v1::Onboard { lease_id: found.lease_id, pool_id: pool.id, targets, ..Default::default() };
    let onboard = client.stream.send(Ask::Onboard(onboard)).await;
    rig.until("a copy is in flight", |status| status.transfers_in_flight > 0).await;
    let socket = rig.socket().to_owned();
    let stopping = tokio::spawn(rig.daemon.stop());
    let mut refused = false;
    let mut done = false;
    let code = loop {
        client.stream.try_send(Ask::Ping(v1::Ping {})).await.ok();
        match client.stream.next().await {
            Ok(Some(message)) => match message.body.unwrap() {
                Body::Refused(reason) => {
                    assert_eq!(reason.refusal(), Refusal::Closed);
                    refused = true;
                }
                Body::TransferDone(transfer) => {
                    assert_eq!((message.id, transfer.blocks_done), (onboard, 4));
                    done = true;
                }
                Body::Pong(_) => {}
                other => panic!("{other:?}"),
            },
            Ok(None) => break None,
            Err(status) => break Some(status.code()),
        }
    };
    assert_eq!((refused, done, code), (true, true, Some(Code::Unavailable)));
    crate::client::wait_readable(&client.side);
    assert!(client.side.receive().unwrap().is_none());
    stopping.await.unwrap();
    assert!(!socket.exists());
}
