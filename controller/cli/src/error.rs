//! Why a command did not do its work, and the exit code for it.

use holdfast_client::ClientError;
use holdfast_client::wire::FieldError;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Exit code: refused by the service, or failed on this machine.
const EXIT_REFUSED: u8 = 1;
/// Exit code: wrong use.
const EXIT_USAGE: u8 = 2;
/// Exit code: no controller reachable.
const EXIT_UNREACHABLE: u8 = 3;

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The command line, in clap's words; `--help` and `--version` too.
    #[error(transparent)]
    Args(#[from] clap::Error),
    /// The command line, in ours.
    #[error("{0}")]
    Usage(String),
    /// The service, or the way there.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It could not be done.
    #[error("{0}")]
    Failed(String),
    /// This machine.
    #[error("{doing}: {error}")]
    Io { doing: String, error: std::io::Error },
}

impl CliError {
    /// An IO error, with what was being done.
    pub(crate) fn io(doing: impl Into<String>, error: std::io::Error) -> Self {
        Self::Io { doing: doing.into(), error }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Io { error, .. } if error.kind() == ErrorKind::BrokenPipe => 0,
            Self::Usage(_) | Self::Client(ClientError::BadUrl { .. }) => EXIT_USAGE,
            Self::Client(ClientError::Unreachable { .. }) => EXIT_UNREACHABLE,
            Self::Args(error) => u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE),
            Self::Client(_) | Self::Failed(_) | Self::Io { .. } => EXIT_REFUSED,
        }
    }

    /// Says it on stderr (help goes to stdout) and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        let mut stderr = std::io::stderr();
        let said = match self {
            Self::Io { error, .. } if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            Self::Args(error) => error.print(),
            Self::Client(ClientError::Refused(error, _)) => {
                writeln!(stderr, "holdfast: {} ({:?})", error.message, error.kind)
            }
            error => writeln!(stderr, "holdfast: {error}"),
        };
        match said {
            // Help that was asked for is the result, not a remark: without it the command has failed.
            Err(failed) if self.exit_code() == 0 && failed.kind() != ErrorKind::BrokenPipe => {
                Self::io("writing", failed).report()
            }
            // Where stderr takes nothing the exit code alone says it.
            _ => ExitCode::from(self.exit_code()),
        }
    }
}

impl From<FieldError> for CliError {
    fn from(error: FieldError) -> Self {
        Self::Usage(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_client::wire::{ApiError, ApiErrorKind};

    #[test]
    fn exit_codes_are_the_contracts() {
        let refused = ApiError { id: "er-1".into(), kind: ApiErrorKind::KeyHeld, message: "held".into() };
        let cases: [(CliError, u8); 6] = [
            (ClientError::Refused(refused, 409).into(), 1),
            (ClientError::OutcomeUnknown { detail: String::new() }.into(), 1),
            (ClientError::Unreachable { detail: String::new() }.into(), 3),
            (ClientError::BadUrl { url: String::new(), problem: String::new() }.into(), 2),
            (CliError::Usage(String::new()), 2),
            (CliError::io("writing", ErrorKind::BrokenPipe.into()), 0),
        ];
        for (error, code) in cases {
            assert_eq!(error.exit_code(), code, "{error:?}");
        }
    }
}
