//! Where clients connect.

use std::str::FromStr;

/// Which node of a cluster a client talks to. It is the same for all clients of a system and for all rows of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// All clients to the leader.
    Leader,
    /// The first client to the first node, the second to the second, and so on.
    Spread,
}

impl Place {
    /// The index of the node for a client.
    pub fn node(self, client: usize, leader: usize, nodes: usize) -> usize {
        match self {
            Self::Leader => leader,
            Self::Spread => client % nodes.max(1),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "leader" => Ok(Self::Leader),
            "spread" => Ok(Self::Spread),
            other => Err(format!("{other:?} is neither leader nor spread")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_spread_or_follow_the_leader() {
        assert_eq!((0..4).map(|client| Place::Spread.node(client, 1, 3)).collect::<Vec<_>>(), [0, 1, 2, 0]);
        assert_eq!(Place::Leader.node(2, 1, 3), 1);
        assert!("both".parse::<Place>().is_err());
    }
}
