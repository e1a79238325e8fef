//! `holdfast snapshot`: backups.
//!
//! Saving and checking need the file's format only. Restoring writes databases, which `holdfast-controller` does: it is
//! started for it, so that this program needs neither RocksDB nor a build of it.

use crate::args::{RestoreArgs, SnapshotCommand};
use crate::dev::beside_this;
use crate::error::CliError;
use crate::format::{duration, time};
use crate::output::{Out, fields};
use holdfast_backup::{Summary, inspect};
use holdfast_client::{Client, ClientError};
use serde_json::json;
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tempfile::NamedTempFile;

/// Bytes that are read from a backup at once.
const READ_BYTES: usize = 1 << 20;

pub(crate) async fn run(
    client: impl FnOnce() -> Result<Client, ClientError>,
    command: SnapshotCommand,
    out: &Out,
) -> Result<(), CliError> {
    match command {
        SnapshotCommand::Save { file } => {
            let summary = save(&client()?, &file).await?;
            match out.json {
                true => out.json(&json!({ "file": file, "backup": summary })),
                false => out.text(&format!(
                    "{}: {} bytes, {} keys, index {}",
                    file.display(),
                    summary.bytes,
                    summary.keys_held,
                    summary.index
                )),
            }
        }
        SnapshotCommand::Inspect { file } => {
            let summary = check(&file)?;
            if out.json { out.json(&summary) } else { out.text(&shown(&summary)) }
        }
        SnapshotCommand::Restore(args) => restore(args, out).await,
    }
}

/// Writes beside `file`, checks what is on disk, and only then gives it its name.
async fn save(client: &Client, file: &Path) -> Result<Summary, CliError> {
    let failed = |error| CliError::io(format!("writing {}", file.display()), error);
    let dir = match file.parent() {
        Some(dir) if dir != Path::new("") => dir.to_owned(),
        _ => PathBuf::from("."),
    };
    // Removed when this function ends without giving it its name.
    let mut aside =
        tempfile::Builder::new().prefix(".holdfast-").suffix(".part").tempfile_in(&dir).map_err(failed)?;
    let mut stream = client.snapshot().await?;
    while let Some(bytes) = stream.next().await? {
        aside.write_all(&bytes).map_err(failed)?;
    }
    aside.as_file().sync_all().map_err(failed)?;
    let summary = check(aside.path()).map_err(|error| {
        CliError::Failed(format!("what {} sent is no whole backup: {error}", stream.url()))
    })?;
    persist(aside, file).and_then(|()| File::open(&dir)?.sync_all()).map_err(failed)?;
    Ok(summary)
}

fn persist(aside: NamedTempFile, file: &Path) -> std::io::Result<()> {
    aside.persist(file).map(drop).map_err(|error| error.error)
}

fn check(file: &Path) -> Result<Summary, CliError> {
    let source =
        File::open(file).map_err(|error| CliError::io(format!("reading {}", file.display()), error))?;
    inspect(BufReader::with_capacity(READ_BYTES, source))
        .map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))
}

fn shown(summary: &Summary) -> String {
    let members: Vec<String> = summary.members.iter().map(|(id, addr)| format!("{id}={addr}")).collect();
    fields(&[
        ("cluster", summary.cluster_id.clone()),
        ("index", format!("{} (term {})", summary.index, summary.term)),
        ("cluster time", time(summary.cluster_time)),
        ("made at", format!("{} by member {}", time(summary.made_at), summary.member)),
        ("members", members.join(",")),
        ("lease", summary.lease.to_string()),
        ("expiry", duration(summary.lease.expiry_ms)),
        ("keys held", summary.keys_held.to_string()),
        ("backends", format!("{} ({} of them live)", summary.backends, summary.backends_live)),
        ("drones", summary.drones.to_string()),
        ("state checksum", format!("{:016x}", summary.state_checksum)),
        ("size", format!("{} bytes, {} rows", summary.bytes, summary.rows)),
        ("sha256", format!("{} (checked)", summary.sha256)),
    ])
}

async fn restore(args: RestoreArgs, out: &Out) -> Result<(), CliError> {
    // Said here rather than by the other program, whose exit code would have to stand for it.
    check(&args.file)?;
    let program = beside_this("holdfast-controller")?;
    let mut command = tokio::process::Command::new(&program);
    command.arg("restore").arg(&args.file).arg("--data-dir").arg(&args.data_dir);
    command.args(["--advertise-peer", &args.advertise_peer]);
    if let Some(token) = args.above_token {
        command.args(["--above-token", &token.to_string()]);
    }
    if let Some(quarantine) = &args.quarantine {
        command.args(["--quarantine", quarantine]);
    }
    if out.json {
        command.arg("--json");
    }
    command.stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());
    let output = command
        .output()
        .await
        .map_err(|error| CliError::io(format!("starting {}", program.display()), error))?;
    if output.status.success() {
        return out.bytes(&output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let problem = said.trim().trim_start_matches("holdfast-controller: ").to_owned();
    match output.status.code() {
        Some(2) => Err(CliError::Usage(problem)),
        _ if problem.is_empty() => Err(CliError::Failed(format!("the restore ended with {}", output.status))),
        _ => Err(CliError::Failed(problem)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_backup_or_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        assert!(check(&file).unwrap_err().to_string().contains(&file.display().to_string()));
        std::fs::write(&file, b"no backup").unwrap();
        let error = check(&file).unwrap_err().to_string();
        assert!(error.contains(&file.display().to_string()) && error.contains("not a backup"), "{error}");
    }
}
