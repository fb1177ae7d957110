//! What keys are called: `/kvbm/v1/KIND/ADDRESS`. The value is the address again.

/// Before all keys.
pub const PREFIX: &str = "/kvbm/v1/";
/// The kind that daemons enter themselves as.
pub const DAEMONS: &str = "daemons";

/// The key of an address. A slash in it would begin a further part.
pub fn key(kind: &str, address: &str) -> String {
    format!("{PREFIX}{kind}/{}", address.replace('/', "|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_part_of_its_key() {
        assert_eq!(key(DAEMONS, "https://n:1"), "/kvbm/v1/daemons/https:||n:1");
    }
}
