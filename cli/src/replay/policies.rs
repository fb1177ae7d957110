//! What can be asked for with `--policy`.

use kvbm::ledger::PolicyKind;

use super::reference::Reference;

/// What others are compared with.
pub(super) const BASELINE: PolicyKind = PolicyKind::Lru;

/// One row of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Candidate {
    /// Through the ledger.
    Ledger(PolicyKind),
    /// Through a plain pool.
    Reference(Reference),
}

impl Candidate {
    pub(super) fn all() -> Vec<Self> {
        let ledger = PolicyKind::ALL.into_iter().map(Self::Ledger);
        ledger.chain(Reference::ALL.into_iter().map(Self::Reference)).collect()
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ledger(policy) => policy.name(),
            Self::Reference(reference) => reference.name(),
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Selection {
    One(Candidate),
    All,
}

impl Selection {
    pub(super) fn candidates(self) -> Vec<Candidate> {
        match self {
            Self::One(one) => vec![one],
            Self::All => Candidate::all(),
        }
    }
}

impl std::str::FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let all = Candidate::all();
        let found = all.iter().find(|candidate| candidate.name() == text);
        found.map(|candidate| Self::One(*candidate)).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|candidate| candidate.name()).collect();
            format!("permitted are all, {}", names.join(", "))
        })
    }
}
