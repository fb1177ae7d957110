//! Lookups on a connection of their own.

use std::time::Duration;

use kvbm_proto::v1::server_message::Body;
use kvbm_proto::v1::{self, ClientMessage, Refusal, ServerMessage, client_message::Body as Ask};
use kvbm_proto::{LOOKUP_BYTES_MAX, LOOKUP_CHANNEL, SideMessage, pack_keys};
use kvbm_shm::{Received, SideSocket};
use prost::Message;

use crate::client::{Client, Stream, keys, side_path};
use crate::engine::EnginePool;
use crate::rig::Rig;

const LONG: Duration = Duration::from_secs(30);

struct Lookups(SideSocket);

impl Lookups {
    /// As a client opens it. `None`: the daemon hangs up.
    fn open(rig: &Rig, token: [u8; 32]) -> Option<Self> {
        let socket = SideSocket::connect(&side_path(rig.socket())).unwrap();
        socket.send(&SideMessage::Lookups { token }.encode(), None).unwrap();
        let lookups = Self(socket);
        let greeting = lookups.receive()?;
        assert_eq!(SideMessage::decode(&greeting), Ok(SideMessage::Bound));
        Some(lookups)
    }

    /// `None`: the daemon hangs up.
    fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; LOOKUP_BYTES_MAX];
        match self.0.receive_within(&mut buffer, Duration::ZERO, LONG).unwrap() {
            Received::Packet(bytes) => Some(buffer[..bytes].to_vec()),
            Received::End => None,
            Received::Nothing => panic!("nothing came"),
        }
    }

    fn send(&self, id: u64, body: Ask) {
        let message = ClientMessage { id, body: Some(body), trace: None };
        self.0.send(&message.encode_to_vec(), None).unwrap();
    }

    fn ask(&self, id: u64, body: Ask) -> Body {
        self.send(id, body);
        let message = ServerMessage::decode(&*self.receive().unwrap()).unwrap();
        assert_eq!(message.id, id);
        message.body.unwrap()
    }
}

fn find(namespace_id: u32, keys: &[[u8; 16]]) -> v1::Match {
    v1::Match { namespace_id, keys: pack_keys(keys), skip_blocks: 1, hold: true, ..Default::default() }
}

fn release(lease_id: u64) -> Ask {
    Ask::ReleaseLease(v1::ReleaseLease { lease_id, whole: true })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_found_there_is_what_is_found_on_the_stream() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    assert!(client.hello.features.iter().any(|feature| feature == LOOKUP_CHANNEL));
    let namespace = client.namespace().await;
    let pool = EnginePool::open(&mut client, v1::PoolMode::Staged, 1).await;
    let lookups = Lookups::open(&rig, client.token()).unwrap();
    let keys = keys(0, 6);
    let nothing = lookups.ask(7, Ask::Match(find(namespace, &keys)));
    assert!(matches!(nothing, Body::Match(v1::MatchReply { host_blocks: 0, lease_id: 0, .. })));
    pool.store_all(&mut client, namespace, &keys).await;

    // Said to come, or not.
    lookups.send(0, Ask::Ping(v1::Ping {}));
    let Body::Match(found) = lookups.ask(8, Ask::Match(find(namespace, &keys))) else { panic!() };
    let Body::Match(on_stream) = client.ask(Ask::Match(find(namespace, &keys))).await else { panic!() };
    assert_eq!((found.host_blocks, &found.slots), (5, &on_stream.slots));
    assert_eq!(rig.daemon.status().leases, 2);
    for lease in [found.lease_id, on_stream.lease_id] {
        client.stream.send(release(lease)).await;
    }
    client.sync().await;
    assert_eq!(rig.daemon.status().leases, 0);

    // Whatever is no lookup is refused, and lookups go on.
    assert_eq!(lookups.ask(9, Ask::Ping(v1::Ping {})), Body::Pong(v1::Pong {}));
    for wrong in [Ask::Match(find(namespace + 1, &keys)), release(1), Ask::Store(v1::Store::default())] {
        let Body::Refused(refused) = lookups.ask(10, wrong) else { panic!() };
        assert!(matches!(refused.refusal(), Refusal::Unknown | Refusal::Invalid), "{refused:?}");
    }
    assert!(matches!(lookups.ask(11, Ask::Match(find(namespace, &keys))), Body::Match(_)));
    // What it holds goes with the session.
    drop(client);
    assert!(lookups.receive().is_none());
    drop(pool);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_opened_once_by_who_has_the_token_of_an_attached_session() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    client.sync().await;
    assert!(Lookups::open(&rig, [7; 32]).is_none());
    let attaching = Stream::open(rig.socket()).await.hello().await.token;
    assert!(Lookups::open(&rig, attaching.try_into().unwrap()).is_none());
    let lookups = Lookups::open(&rig, client.token()).unwrap();
    assert!(Lookups::open(&rig, client.token()).is_none());
    // Bytes that are no message end it, not the session.
    lookups.0.send(b"?", None).unwrap();
    assert!(lookups.receive().is_none());
    client.sync().await;
}
