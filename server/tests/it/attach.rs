//! Getting in, and not getting in.

use kvbm_proto::SideMessage;
use kvbm_proto::v1::{self, Refusal, client_message::Body as Ask, server_message::Body};
use kvbm_shm::SideSocket;
use tonic::Code;

use crate::client::{BASE, Client, Stream, side_path, wait_readable};
use crate::rig::Rig;

#[tokio::test(flavor = "multi_thread")]
async fn only_ping_is_served_before_the_side_channel_is_bound() {
    let rig = Rig::start(&[]).await;
    let mut stream = Stream::open(rig.socket()).await;
    let hello = stream.hello().await;
    assert_eq!((hello.protocol_version, hello.token.len()), (1, 32));
    assert_eq!(stream.ask(Ask::Ping(v1::Ping {})).await, Body::Pong(v1::Pong {}));
    let grants = v1::RequestGrants { pool_id: 1, count: 1 };
    let Body::Refused(refused) = stream.ask(Ask::RequestGrants(grants)).await else { panic!() };
    assert_eq!(refused.refusal(), Refusal::Invalid);
    let state = rig.daemon.status().sessions[0].clone();
    assert_eq!((state.state.as_str(), state.pid), ("attaching", None));

    let side = SideSocket::connect(&side_path(rig.socket())).unwrap();
    side.send(&SideMessage::Bind { token: hello.token.try_into().unwrap() }.encode(), None).unwrap();
    wait_readable(&side);
    assert_eq!(side.receive().unwrap().unwrap().bytes, b"A");
    let Body::Refused(refused) = stream.ask(Ask::RequestGrants(grants)).await else { panic!() };
    assert_eq!(refused.refusal(), Refusal::Unknown, "served now, but there is no such pool");
    let state = rig.daemon.status().sessions[0].clone();
    assert_eq!((state.state.as_str(), state.pid), ("attached", Some(std::process::id())));
    assert_eq!(state.client, format!("test (pid {})", std::process::id()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_or_packet_is_answered_with_end_of_file() {
    let rig = Rig::start(&[]).await;
    let _session = Client::attach(rig.socket()).await;
    for packet in [SideMessage::Bind { token: [7; 32] }.encode(), SideMessage::Bound.encode(), b"?".to_vec()]
    {
        let side = SideSocket::connect(&side_path(rig.socket())).unwrap();
        side.send(&packet, None).unwrap();
        wait_readable(&side);
        assert!(side.receive().unwrap().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hello_must_come_first_and_in_our_version() {
    let rig = Rig::start(&[]).await;
    for (first, detail) in [
        (Ask::Ping(v1::Ping {}), "hello: is to be the first message"),
        (
            Ask::Hello(v1::Hello { protocol_version: 2, ..Default::default() }),
            "hello.protocol_version: 2 is not served, 1 is",
        ),
    ] {
        let mut stream = Stream::open(rig.socket()).await;
        let Body::Refused(refused) = stream.ask(first).await else { panic!() };
        assert_eq!((refused.refusal(), refused.detail.as_str()), (Refusal::Invalid, detail));
        assert_eq!(stream.next().await.unwrap_err().code(), Code::FailedPrecondition);
    }
    assert!(rig.daemon.status().sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_bind_in_time_is_dismissed() {
    let rig = Rig::start(&[("bind_timeout_ms", "50")]).await;
    let mut stream = Stream::open(rig.socket()).await;
    stream.hello().await;
    assert_eq!(stream.next().await.unwrap_err().code(), Code::DeadlineExceeded);
    rig.until("no session", |status| status.sessions.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_session_too_many_is_busy() {
    let rig = Rig::start(&[("sessions_max", "1")]).await;
    let first = Client::attach(rig.socket()).await;
    let mut stream = Stream::open(rig.socket()).await;
    let hello = v1::Hello { protocol_version: 1, ..Default::default() };
    let Body::Refused(refused) = stream.ask(Ask::Hello(hello)).await else { panic!() };
    assert_eq!(refused.refusal(), Refusal::Busy);
    assert_eq!(rig.metric("kvbm_busy_total{queue=\"sessions\"}"), 1.0);
    // It held nothing: the place is free at once, although the process lives.
    drop(first);
    rig.until("no session", |status| status.sessions.is_empty()).await;
    Client::attach(rig.socket()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_listed_while_their_sessions_live() {
    let rig = Rig::start(&[]).await;
    let mut list = rig.registry().await.watch_workers(v1::WatchWorkersRequest {}).await.unwrap().into_inner();
    assert_eq!(list.message().await.unwrap().unwrap().workers.len(), 0);
    let mut client = Client::attach(rig.socket()).await;
    let pool = client.pool(2).await;
    let worker = v1::RegisterWorker {
        worker_id: "w0".into(),
        endpoint: "unix:/tmp/w0".into(),
        model: "tiny".into(),
        role: "both".into(),
        pool_id: pool.id,
        state: "ready".into(),
        ..Default::default()
    };
    assert_eq!(client.ask(Ask::RegisterWorker(worker.clone())).await, Body::Worker(v1::WorkerReply {}));
    let entry = list.message().await.unwrap().unwrap().workers[0].clone();
    assert_eq!(
        (entry.pid, entry.session_id, entry.worker.as_ref()),
        (std::process::id(), client.session, Some(&worker))
    );
    let status = rig.daemon.status();
    assert_eq!((status.workers[0].id.as_str(), status.workers[0].state.as_str()), ("w0", "ready"));
    let draining = v1::RegisterWorker { state: "draining".into(), ..worker.clone() };
    client.ask(Ask::RegisterWorker(draining)).await;
    assert_eq!(list.message().await.unwrap().unwrap().workers[0].worker.as_ref().unwrap().state, "draining");
    let foreign = v1::RegisterWorker { pool_id: 77, ..worker.clone() };
    assert_eq!(client.refused(Ask::RegisterWorker(foreign)).await.0, Refusal::Unknown);
    // Its own pool says what its keys begin with. Where its blocks are in pools of others, it says so itself.
    assert_eq!(entry.base_namespace, BASE);
    let said = v1::RegisterWorker { pool_id: 0, base_namespace: vec![9; 32], ..worker.clone() };
    client.ask(Ask::RegisterWorker(said)).await;
    assert_eq!(list.message().await.unwrap().unwrap().workers[0].base_namespace, [9; 32]);
    let short = v1::RegisterWorker { pool_id: 0, base_namespace: vec![9; 31], ..worker };
    assert!(client.refused(Ask::RegisterWorker(short)).await.1.contains("base_namespace"));
    drop(client);
    assert_eq!(list.message().await.unwrap().unwrap().workers.len(), 0);
}
