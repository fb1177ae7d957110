use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use kvbm::{ManagerConfig, OpenPool, PoolId, SessionId, TrustDomain};
use kvbm_shm::PoolLayout;

use super::*;

/// A manager with a pool, and a namespace.
struct Rig {
    manager: Manager,
    session: SessionId,
    pool: PoolId,
    namespace: NamespaceId,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let manager = Manager::start(ManagerConfig::default()).unwrap();
        let session = manager.open_session(TrustDomain(7));
        let open = OpenPool {
            base: [2; 32],
            layout: PoolLayout { block_bytes: 4096, block_count: 64 },
            tokens_per_block: 16,
            device: "cpu:0".into(),
            fresh: true,
            uuid: [3; 16],
        };
        let pool = manager.open_pool(session, open).unwrap().pool_id;
        let namespace = manager.register_namespace(session, [1; 32], [2; 32], "blue", "tiny").unwrap();
        Self { manager, session, pool, namespace, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("trace")
    }

    fn lines(&self) -> Vec<Line> {
        let text = std::fs::read_to_string(self.path()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn matched(&self, recorder: &Recorder, keys: Vec<SequenceHash>) {
        let found =
            self.manager.match_prefix(self.session, self.namespace, &keys, Some(self.pool), &[]).unwrap();
        recorder.matched(&self.manager, self.namespace, keys, &found);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.manager.stop();
    }
}

fn keys(from: u64, count: u64) -> Vec<SequenceHash> {
    let key = |n: u64| SequenceHash((u128::from(n) << 64 | 7).to_be_bytes());
    (from..from + count).map(key).collect()
}

#[test]
fn what_engines_do_is_written_and_a_restart_goes_on_behind_it() {
    let rig = Rig::new();
    let recorder = Recorder::start(&rig.path(), 1 << 20).unwrap();
    rig.matched(&recorder, keys(0, 3));
    let blocks = rig.manager.request_grants(rig.session, rig.pool, 3).unwrap();
    let all = keys(0, 3);
    let commit = |i: usize| CommitBlock {
        block: blocks[i],
        hash: all[i],
        parent: i.checked_sub(1).map(|before| all[before]),
        retention: None,
    };
    let commits: Vec<CommitBlock> = (0..3).map(commit).collect();
    recorder.committed(&rig.manager, rig.namespace, &commits);
    recorder.stop();
    let lines = rig.lines();
    let [Line::KvbmTrace(_), Line::Namespace(namespace), Line::Match(matched), Line::Commit(committed)] =
        &lines[..]
    else {
        panic!("{lines:?}")
    };
    assert_eq!((namespace.ns, namespace.domain), (rig.namespace.0, 7));
    assert_eq!((namespace.tokens_per_block, namespace.block_bytes), (16, 4096));
    assert_eq!((namespace.tenant.as_str(), namespace.model.as_str()), ("blue", "tiny"));
    assert_eq!((matched.hits, matched.chain.keys.len()), ([0, 0, 0], 3));
    assert_eq!((committed.parent, committed.chain.keys.len()), (None, 0));
    assert_eq!(committed.chain.like, Some([0, 0, 3].into()));
    assert_eq!(recorder.figures().0, 4);
    assert_eq!(std::fs::metadata(rig.path()).unwrap().permissions().mode() & 0o777, 0o600);

    // A daemon that was killed leaves half a line.
    let whole = std::fs::read(rig.path()).unwrap();
    std::fs::write(rig.path(), [&whole[..], b"{\"match\":{\"t\":1"].concat()).unwrap();
    let recorder = Recorder::start(&rig.path(), 1 << 20).unwrap();
    rig.matched(&recorder, keys(0, 1));
    recorder.stop();
    let again = rig.lines();
    assert_eq!(again[..4], lines[..]);
    assert!(matches!(&again[4..], [Line::KvbmTrace(_), Line::Namespace(_), Line::Match(_)]), "{again:?}");
    assert_eq!(recorder.figures().1, std::fs::metadata(rig.path()).unwrap().len());
}

#[test]
fn a_full_file_stays_as_it_is_and_what_is_missing_is_counted() {
    let rig = Rig::new();
    let recorder = Recorder::start(&rig.path(), 2000).unwrap();
    for n in 0..200 {
        rig.matched(&recorder, keys(n * 10, 5));
    }
    recorder.stop();
    let (lines, bytes, _) = recorder.figures();
    assert!(bytes <= 2000 && bytes == std::fs::metadata(rig.path()).unwrap().len());
    assert_eq!(rig.lines().len() as u64, lines);
    assert!((3..200).contains(&lines), "{lines}");
    let before = recorder.figures().2;
    rig.matched(&recorder, keys(0, 5));
    assert_eq!(recorder.figures().2, before + 1, "nobody writes any more");
}

#[test]
fn a_file_that_is_not_ours_is_refused_and_left_alone() {
    let rig = Rig::new();
    let refused = |expected: &str| {
        let error = Recorder::start(&rig.path(), 1 << 20).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error}");
    };
    std::fs::write(rig.path(), "precious\n").unwrap();
    refused("not a recorded trace");
    assert_eq!(std::fs::read(rig.path()).unwrap(), b"precious\n");
    std::fs::remove_file(rig.path()).unwrap();
    let recorder = Recorder::start(&rig.path(), 1 << 20).unwrap();
    refused("another process records into it");
    recorder.stop();
    std::fs::remove_file(rig.path()).unwrap();
    std::fs::create_dir(rig.path()).unwrap();
    let error = Recorder::start(&rig.path(), 1 << 20).unwrap_err();
    assert!(error.to_string().contains("open trace"), "{error}");
}
