//! What can go wrong, as text for whoever runs this: nothing here is handled by its kind.

/// See the module.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Problem(pub String);

/// A figure that can't be taken is not given.
pub type Result<T> = std::result::Result<T, Problem>;

/// Says what was being done.
pub trait During<T> {
    /// Puts `what` in front of the problem.
    fn during(self, what: impl std::fmt::Display) -> Result<T>;
}

impl<T, E: std::fmt::Display> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|error| Problem(format!("{what}: {error}")))
    }
}

impl<T> During<T> for Option<T> {
    fn during(self, what: impl std::fmt::Display) -> Result<T> {
        self.ok_or_else(|| Problem(what.to_string()))
    }
}

/// A problem as an error.
pub fn problem<T>(text: impl Into<String>) -> Result<T> {
    Err(Problem(text.into()))
}
