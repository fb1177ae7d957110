//! The layer below: typed outcomes, many questions at once.

use std::time::Duration;

use kvbm_connector::{BlockRef, Client, ClientError, Committed, Release};
use kvbm_proto::v1::client_message::Body as Question;
use kvbm_proto::v1::server_message::Body as Answer;
use kvbm_proto::v1::{self, Refusal};

use crate::engine::{BASE, NAMESPACE, keys};
use crate::mock::{Hold, Mock, wait_for};

fn open() -> v1::OpenPool {
    v1::OpenPool {
        mode: v1::PoolMode::Owned.into(),
        base: BASE.0.to_vec(),
        block_bytes: 64,
        block_count: 8,
        tokens_per_block: 32,
        shard_count: 1,
        ..Default::default()
    }
}

fn start() -> (tempfile::TempDir, Mock) {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    (dir, mock)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_session_from_greeting_to_match() {
    let (_dir, mock) = start();
    let client = Client::connect(&mock.socket).await.unwrap();
    client.ping().await.unwrap();
    assert_eq!(client.daemon().unwrap().pid(), std::process::id());
    let namespace = client.register_namespace(NAMESPACE, BASE, "t", "m").await.unwrap();
    let (memory, reply) = client.open_pool(open()).await.unwrap();
    assert_eq!((memory.uuid(), reply.pool_id), ([5; 16], 1));
    let blocks = client.request_grants(1, 2).await.unwrap();
    let committed = Committed {
        blocks: blocks.clone(),
        keys: keys(2),
        parents: vec![None, Some(keys(1)[0])],
        retention: vec![],
    };
    client.commit(namespace, 1, committed).await.unwrap();
    let reply = client.match_prefix(namespace, &keys(3), 1).await.unwrap();
    assert_eq!(reply.device, blocks);
    let releases: Vec<_> =
        blocks.iter().map(|&block| Release { block: BlockRef::from(block), pins: 2 }).collect();
    client.release(1, &releases).await.unwrap();
    client.ping().await.unwrap();
    assert!(mock.state.lock().blocks.iter().all(|block| block.pins == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn answers_find_their_questions_in_any_order() {
    let (_dir, mock) = start();
    let client = Client::connect(&mock.socket).await.unwrap();
    mock.hold(Hold { matches: true, ..Hold::default() });
    let ask = |id| {
        let client = client.clone();
        tokio::spawn(async move { client.match_prefix(id, &keys(1), 0).await.unwrap().disk_blocks })
    };
    let (first, second) = (ask(1), ask(2));
    let of = |wanted| move |question: &Question| matches!(question, Question::Match(m) if m.namespace_id == wanted);
    for wanted in [2, 1] {
        let (session, id) = tokio::task::block_in_place(|| mock.held("the question", of(wanted)));
        let reply = v1::MatchReply { disk_blocks: wanted * 10, ..Default::default() };
        mock.state.lock().send(session, id, Answer::Match(reply));
        // Others are answered in between.
        client.ping().await.unwrap();
    }
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (10, 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_late_answer_is_given_back() {
    let (_dir, mock) = start();
    let client = Client::connect(&mock.socket).await.unwrap();
    client.open_pool(open()).await.unwrap();
    mock.hold(Hold { grants: true, ..Hold::default() });
    let hasty = client.with_deadline(Duration::from_millis(30));
    assert_eq!(hasty.request_grants(1, 3).await, Err(ClientError::Deadline));
    tokio::task::block_in_place(|| {
        mock.held("the question", |question| matches!(question, Question::RequestGrants(_)));
        mock.let_go();
        wait_for("the grants to come back", || {
            let returned = mock.logged(|question| match question {
                Question::Release(release) => Some(release.blocks.len()),
                _ => None,
            });
            (returned == [3]).then_some(())
        });
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_late_answer_is_given_back_even_when_there_is_no_room_for_it_yet() {
    let (_dir, mock) = start();
    let client = Client::connect(&mock.socket).await.unwrap();
    client.open_pool(open()).await.unwrap();
    mock.hold(Hold { everything: true, ..Hold::default() });
    let hasty = client.with_deadline(Duration::from_millis(100));
    assert_eq!(hasty.request_grants(1, 3).await, Err(ClientError::Deadline));
    let witness = tokio::spawn({
        let client = client.with_deadline(Duration::from_secs(20));
        async move { client.ping().await }
    });
    let (grants, ping) = tokio::task::block_in_place(|| {
        let grants = mock.held("the question", |question| matches!(question, Question::RequestGrants(_)));
        (grants, mock.held("the witness", |question| matches!(question, Question::Ping(_))))
    });
    // Messages that mean nothing, until no more fit.
    mock.hold(Hold { deaf: true, ..Hold::default() });
    let filler = Committed { keys: keys(250).repeat(16), ..Committed::default() };
    while hasty.commit(1, 1, filler.clone()).await.is_ok() {}
    {
        let mut state = mock.state.lock();
        let blocks: Vec<_> = (0..3).map(|block| v1::BlockRef { block, generation: 1 }).collect();
        for block in &mut state.blocks[..3] {
            (block.generation, block.pins) = (1, 1);
        }
        state.send(grants.0, grants.1, Answer::Grants(v1::Grants { pool_id: 1, blocks }));
        state.send(ping.0, ping.1, Answer::Pong(v1::Pong {}));
    }
    // Answers are taken in one after the other: there was still no room when the late one came.
    witness.await.unwrap().unwrap();
    mock.hold(Hold::default());
    tokio::task::block_in_place(|| {
        wait_for("the grants to come back", || {
            mock.state.lock().blocks.iter().all(|block| block.pins == 0).then_some(())
        });
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn absence_refusal_and_end_are_answers() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = Client::connect(dir.path().join("none.sock")).await;
    assert!(matches!(nobody.err(), Some(ClientError::Unavailable { .. })));
    let (_dir, mock) = start();
    let client = Client::connect(&mock.socket).await.unwrap();
    mock.hold(Hold { refuse_pool: true, ..Hold::default() });
    let refused = client.open_pool(open()).await.err();
    assert!(matches!(refused, Some(ClientError::Refused { refusal: Refusal::Exhausted, .. })), "{refused:?}");
    tokio::task::block_in_place(|| drop(mock));
    client.ended().await;
    assert!(matches!(client.ping().await, Err(ClientError::Unavailable { .. })));
}
