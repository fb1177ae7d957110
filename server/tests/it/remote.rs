//! The registry over TCP: who is let in, who is not, and what is served there.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use kvbm_proto::v1::admin_client::AdminClient;
use kvbm_proto::v1::cache_client::CacheClient;
use kvbm_proto::v1::registry_client::RegistryClient;
use kvbm_proto::v1::{self, client_message::Body as Ask};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use crate::authority::{Authority, Pair, secret};
use crate::client::{Client, keys};
use crate::rig::Rig;

const TOKEN: &str = "a-token-of-enough-letters";

/// A daemon that serves over TCP with TLS, and the authority of its certificate.
struct Served {
    rig: Rig,
    authority: Authority,
    /// Files of its settings.
    _files: tempfile::TempDir,
}

/// What protects it, besides TLS.
enum Demands {
    Token,
    ClientCertificate,
    Both,
}

impl Served {
    async fn start(demands: Demands, settings: &[(&str, &str)]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let Pair { certificate, key } = authority.sign("127.0.0.1");
        let file = |name: &str, text: &str| secret(files.path(), name, text).display().to_string();
        let mut all = vec![
            ("grpc_listen", "127.0.0.1:0".to_owned()),
            ("grpc_tls_cert", file("cert.pem", &certificate)),
            ("grpc_tls_key", file("key.pem", &key)),
        ];
        if matches!(demands, Demands::Token | Demands::Both) {
            all.push(("grpc_token_file", file("token", &format!("{TOKEN}\n"))));
        }
        if matches!(demands, Demands::ClientCertificate | Demands::Both) {
            all.push(("grpc_tls_client_ca", file("ca.pem", &authority.certificate)));
        }
        let all: Vec<_> = all.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let rig = Rig::start(&[&all, settings].concat()).await;
        Self { rig, authority, _files: files }
    }

    fn address(&self) -> SocketAddr {
        let url = self.rig.daemon.addresses().grpc.clone().unwrap();
        assert_eq!(self.rig.daemon.status().daemon.grpc.as_ref(), Some(&url));
        url.strip_prefix("https://").unwrap().parse().unwrap()
    }

    async fn channel(&self, pair: Option<&Pair>) -> Result<Channel, tonic::transport::Error> {
        connect(self.address(), Some(self.authority.client(pair))).await
    }

    /// Waits until more were rejected than before. How many is the client's business: it may try again by itself.
    async fn rejected_more(&self, reason: &str, before: f64) -> f64 {
        self.rig.until("rejected", |_| self.rejected(reason) > before).await;
        self.rejected(reason)
    }

    fn rejected(&self, reason: &str) -> f64 {
        self.rig.metric(&format!("kvbm_grpc_rejected_total{{reason=\"{reason}\"}}"))
    }
}

async fn connect(
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Channel, tonic::transport::Error> {
    let connect = tower::service_fn(move |_: Uri| {
        let tls = tls.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            Ok::<_, std::io::Error>(match tls {
                None => TokioIo::new(Box::new(stream) as Box<dyn Bytes>),
                Some(tls) => {
                    let name = ServerName::IpAddress(address.ip().into());
                    let stream = TlsConnector::from(tls).connect(name, stream).await?;
                    TokioIo::new(Box::new(stream) as Box<dyn Bytes>)
                }
            })
        }
    });
    Endpoint::from_static("http://kvbm").connect_with_connector(connect).await
}

trait Bytes: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Bytes for T {}

fn bearing<T>(message: T, header: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", header.parse().unwrap());
    request
}

fn with_token<T>(message: T) -> Request<T> {
    bearing(message, &format!("Bearer {TOKEN}"))
}

async fn status(channel: Channel, request: Request<v1::StatusRequest>) -> Result<(), Status> {
    RegistryClient::new(channel).status(request).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_the_token_sees_workers_events_and_snapshots() {
    let served = Served::start(Demands::Token, &[]).await;
    let mut client = Client::attach(served.rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    let worker = v1::RegisterWorker {
        worker_id: "w".into(),
        endpoint: "http://node-7:9000".into(),
        role: "both".into(),
        state: "ready".into(),
        pool_id: pool.id,
        ..Default::default()
    };
    client.ask(Ask::RegisterWorker(worker.clone())).await;
    client.store(namespace, &pool, &keys(0, 3)).await;

    let mut registry = RegistryClient::new(served.channel(None).await.unwrap());
    let workers = registry.watch_workers(with_token(v1::WatchWorkersRequest {})).await.unwrap();
    let list = workers.into_inner().message().await.unwrap().unwrap();
    assert_eq!(list.workers.len(), 1);
    assert_eq!(list.workers[0].worker.as_ref(), Some(&worker));
    let watch = v1::WatchEventsRequest { after_sequence: 0 };
    let mut events = registry.watch_events(with_token(watch)).await.unwrap().into_inner();
    assert_eq!(events.message().await.unwrap().unwrap().events[0].sequence, 1);
    let parts = registry.snapshot(with_token(v1::SnapshotRequest {})).await.unwrap();
    let mut parts = parts.into_inner();
    let mut stored = 0;
    while let Some(part) = parts.message().await.unwrap() {
        stored += part.stored.len();
    }
    assert!(stored >= 3, "{stored} blocks in the snapshot");
    registry.status(with_token(v1::StatusRequest {})).await.unwrap();
    assert_eq!(served.rig.metric("kvbm_grpc_connections"), 1.0);
    assert_eq!(served.rejected("token"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_token_nothing_is_answered_and_each_try_is_counted() {
    let served = Served::start(Demands::Token, &[]).await;
    let channel = served.channel(None).await.unwrap();
    let mut tries = 0.0;
    let wrong = [
        format!("Bearer {TOKEN}x"),
        format!("Bearer {}", &TOKEN[1..]),
        "Bearer ".to_owned(),
        TOKEN.to_owned(),
        format!("Basic {TOKEN}"),
    ];
    for header in wrong {
        let refused = status(channel.clone(), bearing(v1::StatusRequest {}, &header)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{header}");
        assert!(!refused.message().contains(TOKEN));
        tries += 1.0;
        assert_eq!(served.rejected("token"), tries);
    }
    let refused = status(channel.clone(), Request::new(v1::StatusRequest {})).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    // Nor does anybody learn what is served.
    let empty = tokio_stream::iter(Vec::<v1::ClientMessage>::new());
    let refused = CacheClient::new(channel.clone()).attach(empty).await.unwrap_err();
    assert_eq!((refused.code(), served.rejected("token")), (Code::Unauthenticated, tries + 2.0));
    // The same connection may still be used rightly.
    status(channel, with_token(v1::StatusRequest {})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_cannot_attach_over_tcp() {
    let served = Served::start(Demands::Token, &[]).await;
    let mut cache = CacheClient::new(served.channel(None).await.unwrap());
    let empty = tokio_stream::iter(Vec::<v1::ClientMessage>::new());
    assert_eq!(cache.attach(with_token(empty)).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_with_tls_takes_nothing_else() {
    let served = Served::start(Demands::Token, &[]).await;
    let plain = async {
        let channel = connect(served.address(), None).await.map_err(|error| error.to_string())?;
        status(channel, with_token(v1::StatusRequest {})).await.map_err(|status| status.to_string())
    };
    plain.await.unwrap_err();
    let plain = served.rejected_more("tls", 0.0).await;
    // Nor does a client take a daemon whose certificate it cannot check.
    let stranger = Authority::new();
    connect(served.address(), Some(stranger.client(None))).await.unwrap_err();
    served.rejected_more("tls", plain).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_shows_a_certificate_where_one_is_demanded() {
    for demands in [Demands::ClientCertificate, Demands::Both] {
        let both = matches!(demands, Demands::Both);
        let served = Served::start(demands, &[]).await;
        let ask = async |pair: Option<&Pair>, request| {
            // A client of TLS 1.3 learns that it was refused only when it reads.
            let channel =
                served.channel(pair).await.map_err(|error| Status::unavailable(error.to_string()))?;
            status(channel, request).await
        };
        let right = served.authority.sign("router");
        let foreign = Authority::new().sign("router");
        ask(None, with_token(v1::StatusRequest {})).await.unwrap_err();
        let without = served.rejected_more("tls", 0.0).await;
        ask(Some(&foreign), with_token(v1::StatusRequest {})).await.unwrap_err();
        served.rejected_more("tls", without).await;
        ask(Some(&right), with_token(v1::StatusRequest {})).await.unwrap();
        let without = ask(Some(&right), Request::new(v1::StatusRequest {})).await;
        assert_eq!(without.is_err(), both, "a token is demanded besides: {both}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_may_do_without_tls_but_not_without_token() {
    let files = tempfile::tempdir().unwrap();
    let token = secret(files.path(), "token", TOKEN).display().to_string();
    let rig = Rig::start(&[("grpc_listen", "127.0.0.1:0"), ("grpc_token_file", &token)]).await;
    let url = rig.daemon.addresses().grpc.clone().unwrap();
    let address: SocketAddr = url.strip_prefix("http://").unwrap().parse().unwrap();
    let channel = connect(address, None).await.unwrap();
    status(channel.clone(), with_token(v1::StatusRequest {})).await.unwrap();
    let refused = status(channel, Request::new(v1::StatusRequest {})).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_nothing_permitted_is_hung_up_on_and_keeps_nobody_out() {
    let served = Served::start(Demands::Token, &[("bind_timeout_ms", "1000")]).await;
    // More than there are places: some that say nothing, and one that is connected but has no token.
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(served.address()).await.unwrap());
    }
    let channel = served.channel(None).await.unwrap();
    let refused = status(channel.clone(), Request::new(v1::StatusRequest {})).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let welcome = served.channel(None).await.unwrap();
    let watch = async |channel| {
        let watch = with_token(v1::WatchWorkersRequest {});
        RegistryClient::new(channel).watch_workers(watch).await.unwrap().into_inner()
    };
    let mut workers = watch(welcome).await;
    workers.message().await.unwrap().unwrap();
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0);
    }
    served.rig.until("all are counted", |_| served.rejected("silent") == 301.0).await;
    // Who was let in stays for as long as it likes.
    let mut client = Client::attach(served.rig.socket()).await;
    let worker = v1::RegisterWorker {
        worker_id: "w".into(),
        endpoint: "unix:/w".into(),
        role: "both".into(),
        state: "ready".into(),
        ..Default::default()
    };
    let pool = client.pool(1).await;
    client.ask(Ask::RegisterWorker(v1::RegisterWorker { pool_id: pool.id, ..worker })).await;
    assert_eq!(workers.message().await.unwrap().unwrap().workers.len(), 1);
    assert_eq!(served.rig.metric("kvbm_grpc_connections"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_daemon_ends_its_watchers_and_a_taken_port_is_named() {
    let served = Served::start(Demands::Token, &[]).await;
    let mut registry = RegistryClient::new(served.channel(None).await.unwrap());
    let workers = registry.watch_workers(with_token(v1::WatchWorkersRequest {})).await.unwrap();
    let mut workers = workers.into_inner();
    workers.message().await.unwrap().unwrap();

    let (address, files) = (served.address().to_string(), served._files.path());
    let error = start_at(&address, files).await;
    assert_eq!((error.exit_code(), error.to_string().contains(&address)), (1, true), "{error}");

    let stopping = tokio::spawn(served.rig.daemon.stop());
    while let Ok(Some(_)) = workers.message().await {}
    stopping.await.unwrap();
}

async fn start_at(address: &str, files: &Path) -> kvbm_server::StartError {
    let dir = tempfile::tempdir().unwrap();
    let token = files.join("token").display().to_string();
    let settings = [("grpc_listen", address), ("grpc_token_file", &token)];
    kvbm_server::Daemon::start(crate::rig::config(dir.path(), &settings)).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_bound_when_the_token_file_became_readable_by_others() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let token = secret(dir.path(), "token", TOKEN);
    let settings = [("grpc_listen", "127.0.0.1:0"), ("grpc_token_file", token.to_str().unwrap())];
    let config = crate::rig::config(dir.path(), &settings);
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o640)).unwrap();
    let socket = config.socket.clone();
    let error = kvbm_server::Daemon::start(config).await.unwrap_err();
    assert_eq!(
        (error.exit_code(), error.to_string().as_str()),
        (
            2,
            "invalid grpc_token_file: permitted is a file that group and others cannot read (its mode is 640, not \
             600 or 400)"
        )
    );
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_are_changed_by_whoever_has_the_token_and_not_by_a_certificate_alone() {
    for (demands, expected) in [
        (Demands::Token, Code::Ok),
        (Demands::Both, Code::Ok),
        (Demands::ClientCertificate, Code::Unimplemented),
    ] {
        let needs_certificate = !matches!(demands, Demands::Token);
        let served = Served::start(demands, &[]).await;
        let pair = served.authority.sign("client");
        let channel = served.channel(needs_certificate.then_some(&pair)).await.unwrap();
        let mut admin = AdminClient::new(channel);
        let answer = admin.list_pins(with_token(v1::ListPinsRequest {})).await;
        assert_eq!(answer.map_or_else(|status| status.code(), |_| Code::Ok), expected);
        if expected == Code::Ok {
            let wrong = bearing(v1::UnpinRequest { pin_id: 1 }, "Bearer another-token-of-letters");
            assert_eq!(admin.unpin(wrong).await.unwrap_err().code(), Code::Unauthenticated);
            let right = with_token(v1::UnpinRequest { pin_id: 1 });
            assert_eq!(admin.unpin(right).await.unwrap_err().code(), Code::NotFound);
        }
    }
}
