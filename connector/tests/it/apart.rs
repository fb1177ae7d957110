//! A scheduler half that is a process of its own, of an engine that asks again.

use std::time::Duration;

use kvbm_connector::engine::{EngineProcess, EngineSettings, Found, Prompt, SharedFacts};
use kvbm_proto::v1::client_message::Body as Question;

use crate::mock::{Hold, Mock, wait_for};

#[test]
fn a_request_waits_for_drives_only_while_their_daemon_lives() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    mock.state.lock().disk_has_all = true;
    mock.hold(Hold { promotions: true, ..Hold::default() });
    let long = Duration::from_secs(600);
    let settings = EngineSettings {
        apart: Some([9; 16]),
        tokens_per_block: 4,
        lookup_deadline: Duration::from_secs(1),
        detach_after: long,
        disk_wait: (long, Duration::ZERO, long),
        ..EngineSettings::new(&mock.socket)
    };
    let scheduler = EngineProcess::new(settings);
    let facts = SharedFacts { layout: "flat".into(), block_bytes: 64, ..SharedFacts::default() };
    scheduler.join(&facts).unwrap();
    wait_for("a session", || scheduler.is_attached().then_some(()));
    let ask = || {
        let tokens = (0..17).collect();
        scheduler.look_up(Prompt { id: 1, tokens, cacheable: true, ..Prompt::default() }, 0, 0)
    };
    assert_eq!(ask(), Found::Later);
    mock.held("the wait", |question| matches!(question, Question::Prefetch(ask) if ask.wait));
    assert_eq!(ask(), Found::Later);
    mock.hold(Hold { everything: true, ..Hold::default() });
    let found = wait_for("the end of the wait", || Some(ask()).filter(|found| *found != Found::Later));
    assert_eq!(found, Found::Tokens(0, false), "a silent daemon is not asked again");
}
