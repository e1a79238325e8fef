//! Flags from the environment and from a TOML file: both become what clap falls back on.

use crate::error::CliError;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Command};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use toml::{Table, Value};

/// Longest settings file, in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The settings file that the command line or the environment names; empty if neither does. It has to be known before
/// the command line is parsed, because it changes what parsing falls back on.
pub(crate) fn file(argv: &[OsString], from_env: Option<OsString>) -> Result<Table, CliError> {
    let Some(path) = named(argv).or(from_env).map(PathBuf::from) else { return Ok(Table::new()) };
    let bad = |problem: String| CliError::Usage(format!("settings file {}: {problem}", path.display()));
    let length_bytes = std::fs::metadata(&path).map_err(|error| bad(error.to_string()))?.len();
    if length_bytes > FILE_BYTES_MAX {
        return Err(bad(format!("is {length_bytes} bytes, at most {FILE_BYTES_MAX} are allowed")));
    }
    let text = std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    text.parse::<Table>().map_err(|error| bad(error.to_string()))
}

/// The value of `--config`, wherever it stands before a `--`.
fn named(argv: &[OsString]) -> Option<OsString> {
    let mut rest = argv.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = rest.next() {
        if arg == "--config" {
            return rest.next().cloned();
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(OsString::from(path));
        }
    }
    None
}

/// Makes every flag of `command` fall back on its environment variable and then on `settings`.
pub(crate) fn apply(command: Command, settings: Table) -> Result<Command, CliError> {
    level(command, settings, "HOLDFAST", "")
}

fn level(command: Command, mut settings: Table, env_prefix: &str, path: &str) -> Result<Command, CliError> {
    let mut problem = None;
    let mut command = command.mut_args(|mut arg| {
        let Some(long) = arg.get_long().map(str::to_owned) else { return arg };
        if arg.get_env().is_none() {
            arg = arg.env(format!("{env_prefix}_{}", in_capitals(&long))).hide_env(true);
        }
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            arg = arg.value_parser(BoolishValueParser::new());
        }
        // Which file to read can't stand in the file.
        if long == "config" {
            return arg;
        }
        // A name in TOML reads better with underscores.
        let Some(value) = settings.remove(&long).or_else(|| settings.remove(&long.replace('-', "_"))) else {
            return arg;
        };
        match texts(&value) {
            Some(texts) => arg.required(false).default_values(texts),
            None => {
                problem =
                    Some(format!("setting {path}{long} must be a text, a number, a truth value or a list"));
                arg
            }
        }
    });
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for name in names {
        let own = match settings.remove(&name).or_else(|| settings.remove(&name.replace('-', "_"))) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(_) => return Err(CliError::Usage(format!("setting {path}{name} must be a table"))),
        };
        let env_prefix = format!("{env_prefix}_{}", in_capitals(&name));
        let path = format!("{path}{name}.");
        let mut result = Ok(());
        command = command.mut_subcommand(name, |sub| {
            let plain = sub.clone();
            level(sub, own, &env_prefix, &path).unwrap_or_else(|error| {
                result = Err(error);
                plain
            })
        });
        result?;
    }
    if let Some(problem) = problem {
        return Err(CliError::Usage(problem));
    }
    match settings.keys().next() {
        Some(unknown) => Err(CliError::Usage(format!("setting {path}{unknown} is not known"))),
        None => Ok(command),
    }
}

fn in_capitals(flag: &str) -> String {
    flag.replace('-', "_").to_uppercase()
}

/// What the value would be on the command line.
fn texts(value: &Value) -> Option<Vec<clap::builder::OsStr>> {
    let one = |value: &Value| {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            Value::Boolean(truth) => truth.to_string(),
            _ => return None,
        };
        Some(clap::builder::OsStr::from(<OsStr as ToOwned>::to_owned(OsStr::new(&text))))
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => one(value).map(|text| vec![text]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{BackendsCommand, Cli, Command as CliCommand, KeysCommand};
    use clap::{CommandFactory, FromArgMatches};

    fn parse(settings: &str, argv: &[&str]) -> Result<Cli, CliError> {
        let command = apply(Cli::command(), settings.parse().unwrap())?;
        let argv = std::iter::once("holdfast").chain(argv.iter().copied());
        let mut matches = command.try_get_matches_from(argv)?;
        Ok(Cli::from_arg_matches_mut(&mut matches)?)
    }

    const SETTINGS: &str = r#"
        controller = ["http://a", "http://b"]
        json = true
        timeout = "5s"
        [keys.list]
        limit = 7
        [backends.logs]
        data_dir = "/var/lib/holdfast"
        [dev]
        base-port = 9000
    "#;

    #[test]
    fn the_file_fills_in_what_the_command_line_leaves_out() {
        let cli = parse(SETTINGS, &["keys", "list"]).unwrap();
        assert_eq!((cli.controller.len(), cli.json, cli.timeout_ms), (2, true, 5_000));
        assert!(matches!(cli.command, CliCommand::Keys(KeysCommand::List { limit, .. }) if limit.rows == 7));
        let cli = parse(SETTINGS, &["--controller", "c", "keys", "list", "--limit", "8"]).unwrap();
        assert_eq!(cli.controller, ["c"]);
        assert!(matches!(cli.command, CliCommand::Keys(KeysCommand::List { limit, .. }) if limit.rows == 8));
    }

    #[test]
    fn a_required_flag_may_stand_in_the_file() {
        let cli = parse(SETTINGS, &["backends", "logs", "ba-1"]).unwrap();
        assert!(
            matches!(cli.command, CliCommand::Backends(BackendsCommand::Logs(l)) if l.data_dir.len() == 1)
        );
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        for (settings, named) in [
            ("colour = 1", "colour"),
            ("[keys.list]\nlimits = 1", "keys.list.limits"),
            ("keys = 1", "keys"),
            ("timeout = 1.5", "timeout"),
            ("config = \"x\"", "config"),
        ] {
            let error = parse(settings, &["keys", "list"]).unwrap_err();
            assert!(matches!(&error, CliError::Usage(text) if text.contains(named)), "{settings}: {error}");
        }
        // A value of the wrong form is clap's to refuse.
        assert!(matches!(parse("timeout = \"x\"", &["keys", "list"]), Err(CliError::Args(_))));
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        fn check(command: &Command) {
            for arg in command.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let env = arg.get_env().and_then(OsStr::to_str).unwrap_or_default();
                assert!(env.starts_with("HOLDFAST_"), "{} {:?}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&apply(Cli::command(), Table::new()).unwrap());
    }

    #[test]
    fn the_file_is_found_before_the_command_line_is_parsed() {
        let argv = |args: &[&str]| args.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(named(&argv(&["h", "keys", "--config", "x"])), Some("x".into()));
        assert_eq!(named(&argv(&["h", "--config=y", "keys"])), Some("y".into()));
        assert_eq!(named(&argv(&["h", "connect", "--", "--config", "x"])), None);
        assert!(matches!(file(&argv(&["h", "--config", "/no/such"]), None), Err(CliError::Usage(_))));
    }
}
