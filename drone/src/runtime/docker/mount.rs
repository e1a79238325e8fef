//! The directory that is mounted into a container, below the drone's `--mount-base`.
//!
//! ```text
//!   BASE/<key>                 mount: true, a key without a namespace (as Plane has it)
//!   BASE/<path>                mount: "path", a key without a namespace
//!   BASE/@<namespace>/<key>    mount: true
//!   BASE/@<namespace>/<path>   mount: "path"
//! ```
//!
//! Names of keys and namespaces are encoded so that different ones never share a directory, and none is `..`, hidden, or
//! begins with `@`. A path is taken as it is, and refused if it is absolute, holds `..`, begins with `@`, or leads over a
//! symbolic link, wherever that leads: each directory is opened below the one before it, and links are not followed.
//!
//! The engine goes the same way again when the container starts. A backend that has `a` mounted can put a link in the
//! place of `a/b` in between; so who hands out paths should not hand out one inside another to backends that do not trust
//! each other.

use super::fields::MountField;
use holdfast_wire::{FieldError, KeyConfig};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

const FIELD: &str = "executable.mount";
/// Longest path that may be asked for, in bytes.
const PATH_BYTES_MAX: usize = 1_024;
/// Longest name of a directory that stands for a key or namespace, in bytes; file systems take 255.
const NAME_BYTES_MAX: usize = 200;
/// How much of a longer name is kept beside its hash, for people, in bytes.
const NAME_BYTES_KEPT: usize = 64;
/// Of directories that are made.
const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);

/// Makes sure of the directory to mount, if any, and names it. `base` is the drone's own, without links in it.
pub(super) fn directory(
    base: Option<&Path>,
    mount: &MountField,
    key: &KeyConfig,
) -> Result<Option<PathBuf>, FieldError> {
    let Some(names) = names(mount, key)? else { return Ok(None) };
    let Some(base) = base else {
        return Err(FieldError::new(FIELD, "is not possible on this drone, which has no --mount-base"));
    };
    open_or_make(base, &names).map(Some)
}

/// The names of the directories on the way from the base.
fn names(mount: &MountField, key: &KeyConfig) -> Result<Option<Vec<String>>, FieldError> {
    let mut names = Vec::new();
    if !key.namespace.is_empty() {
        names.push(format!("@{}", encode(&key.namespace)));
    }
    match mount {
        MountField::None => return Ok(None),
        MountField::OfKey => names.push(encode(&key.name)),
        MountField::Path(path) => {
            check_path(path)?;
            names.extend(path.trim_end_matches('/').split('/').map(str::to_owned));
        }
    }
    Ok(Some(names))
}

fn check_path(path: &str) -> Result<(), FieldError> {
    let refuse = |problem: &str| Err(FieldError::new(FIELD, problem));
    if path.len() > PATH_BYTES_MAX {
        return refuse(&format!("must have at most {PATH_BYTES_MAX} bytes"));
    }
    if path.starts_with('/') {
        return refuse("must not be absolute");
    }
    if path.starts_with('@') {
        return refuse("must not begin with '@': that is where namespaces are");
    }
    if path.contains('\0') {
        return refuse("must not hold NUL bytes");
    }
    // "a//b" and "a/./b" too: what looks odd is refused, not repaired.
    if path.trim_end_matches('/').split('/').any(|name| matches!(name, "" | "." | "..")) {
        return refuse("must name a directory below the base, without '.' and '..'");
    }
    Ok(())
}

/// A directory's name for any text. Different texts have different names; `%` begins what stands for something else.
fn encode(text: &str) -> String {
    let plain = |at: usize, b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b) || (b == b'.' && at > 0);
    let mut name = String::new();
    for (at, byte) in text.bytes().enumerate() {
        if plain(at, byte) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    if name.is_empty() {
        // A name that nothing else is encoded to.
        return "%".to_owned();
    }
    if name.len() > NAME_BYTES_MAX {
        let hash: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        // Only ASCII is in it.
        name.truncate(NAME_BYTES_KEPT);
        // No text is encoded with "%=" in it.
        name = format!("{name}%={hash}");
    }
    name
}

fn open_or_make(base: &Path, names: &[String]) -> Result<PathBuf, FieldError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut path = base.to_owned();
    let problem = |path: &Path, e: Errno| match e {
        Errno::ELOOP | Errno::ENOTDIR => {
            FieldError::new(FIELD, format!("leads over {}, which is no directory", path.display()))
        }
        e => FieldError::new(FIELD, format!("{}: {e}", path.display())),
    };
    let mut directory = open(base, flags, Mode::empty()).map_err(|e| problem(base, e))?;
    for name in names {
        path.push(name);
        let below = || openat(&directory, name.as_str(), flags, Mode::empty());
        let opened = match below() {
            Err(Errno::ENOENT) => match mkdirat(&directory, name.as_str(), DIRECTORY_MODE) {
                // Somebody else was faster; what it is shows when it is opened.
                Ok(()) | Err(Errno::EEXIST) => below(),
                Err(e) => Err(e),
            },
            opened => opened,
        };
        directory = opened.map_err(|e| problem(&path, e))?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn key(name: &str, namespace: &str) -> KeyConfig {
        KeyConfig { name: name.into(), namespace: namespace.into(), tag: String::new() }
    }

    fn path(path: &str) -> MountField {
        MountField::Path(path.to_owned())
    }

    #[test]
    fn each_form_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        for (mount, key, expected) in [
            (MountField::OfKey, key("room", ""), "room"),
            (MountField::OfKey, key("room", "ns"), "@ns/room"),
            (path("a/b"), key("room", ""), "a/b"),
            (path("a/b/"), key("room", "ns"), "@ns/a/b"),
            (MountField::OfKey, key("../../etc", "a/b"), "@a%2Fb/%2E.%2F..%2Fetc"),
            (MountField::OfKey, key("@ns", ""), "%40ns"),
            (MountField::OfKey, key("", ".."), "@%2E./%"),
        ] {
            let made = directory(Some(&base), &mount, &key).unwrap().unwrap();
            assert_eq!(made, base.join(expected));
            assert!(made.is_dir());
            assert_eq!(directory(Some(&base), &mount, &key).unwrap().unwrap(), made, "it is there already");
        }
        assert_eq!(directory(None, &MountField::None, &key("room", "")).unwrap(), None);
        assert_eq!(directory(None, &MountField::OfKey, &key("room", "")).unwrap_err().field, FIELD);
    }

    #[test]
    fn no_path_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap().join("base");
        std::fs::create_dir_all(base.join("@other/secret")).unwrap();
        std::fs::create_dir(base.join("inside")).unwrap();
        symlink("/etc", base.join("out")).unwrap();
        symlink("../@other", base.join("inside/link")).unwrap();
        symlink("nowhere", base.join("dangling")).unwrap();
        std::fs::write(base.join("file"), "").unwrap();
        for bad in [
            "..",
            "../x",
            "a/../../x",
            "a/..",
            "/etc",
            "/",
            "",
            ".",
            "./a",
            "a//b",
            "a/./b",
            "@other",
            "@other/secret",
            "a\0b",
            "out",
            "out/ssl",
            "inside/link",
            "inside/link/secret",
            "dangling",
            "file",
            "file/x",
            &"x".repeat(PATH_BYTES_MAX + 1),
            &"x".repeat(300),
        ] {
            let refused = directory(Some(&base), &path(bad), &key("room", ""));
            assert_eq!(refused.map_err(|e| e.field), Err(FIELD), "{bad:?}");
        }
        assert!(!dir.path().join("x").exists(), "nothing was made outside");
        assert!(!base.join("nowhere").exists());
        // A link in the place of the key's own directory, or of its namespace.
        symlink("/etc", base.join("room")).unwrap();
        assert!(directory(Some(&base), &MountField::OfKey, &key("room", "")).is_err());
        symlink("@other", base.join("@ns")).unwrap();
        assert!(directory(Some(&base), &MountField::OfKey, &key("secret", "ns")).is_err());
    }

    #[test]
    fn a_long_name_is_cut_and_stays_its_own() {
        let (a, b) = (encode(&"é".repeat(500)), encode(&format!("{}x", "é".repeat(500))));
        assert!(a.len() <= NAME_BYTES_MAX && b.len() <= NAME_BYTES_MAX && a != b, "{a} {b}");
    }

    proptest! {
        #[test]
        fn different_keys_never_share_a_directory(
            a in ("[ab./@%=]{0,4}", "[ab./@%=]{0,4}"),
            b in ("[ab./@%=]{0,4}", "[ab./@%=]{0,4}"),
        ) {
            let names = |(name, namespace): &(String, String)| {
                names(&MountField::OfKey, &key(name, namespace)).unwrap().unwrap()
            };
            prop_assert_eq!(names(&a) == names(&b), a == b);
            for name in names(&a) {
                prop_assert!(!name.is_empty() && !name.starts_with('.') && !name.contains('/'));
            }
        }

        #[test]
        fn a_path_of_one_namespace_is_in_no_other(path in ".{0,12}") {
            if let Ok(Some(names)) = names(&MountField::Path(path), &key("room", "")) {
                prop_assert!(!names.iter().any(|name| name == ".." || name.is_empty()));
                prop_assert!(!names[0].starts_with('@'));
            }
        }
    }
}
