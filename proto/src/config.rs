//! Settings: a TOML file, overridden by the environment, read into a type.
//!
//! Owns the search for the file, the overrides `TILLCAST__SECTION__KEY`, and the words of what is
//! wrong: file, line, key or variable, and the nearest known key. The only room that reads the
//! environment. Never changes anything; the power may go at any time.

mod human;
mod tree;

pub use human::{HumanBytes, HumanDuration, Secret, bytes};

use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use tree::{Place, Tree};

/// Settings that cannot be used; exit code 2. The text names file, line, key or variable, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Settings with where they came from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings.
    pub value: T,
    /// What relative paths in them are relative to; absolute.
    pub dir: PathBuf,
    /// The file; none if the environment says it all.
    pub file: Option<PathBuf>,
}

/// Where settings lie when `--config` does not say, after the working directory.
const SYSTEM_DIR: &str = "/etc/tillcast";
/// What a variable that overrides a setting begins with.
const PREFIX: &str = "TILLCAST__";
/// Nobody writes a longer file by hand.
const MAX_BYTES: u64 = 1 << 20;

/// Reads `--config FILE`, else ./NAME, else /etc/tillcast/NAME, then the overrides `TILLCAST__…`
/// in `env` (mains hand in `environment()`). Without any file the environment must say it all.
pub fn load<T: DeserializeOwned>(
    explicit: Option<&Path>,
    default_name: &str,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded<T>, ConfigError> {
    let found = match explicit {
        Some(path) => Some((
            path.to_owned(),
            read(path)?.ok_or_else(|| ConfigError(format!("{}: no such file", path.display())))?,
        )),
        None => search([Path::new(""), Path::new(SYSTEM_DIR)], default_name)?,
    };
    let text = found.as_ref().map_or("", |(_, text)| text);
    let name = found.as_ref().map(|(path, _)| path.display().to_string());
    let in_file = |message: String| ConfigError(format!("{}: {message}", name.as_deref().unwrap_or("settings")));
    let mut tree = Tree::parse(text).map_err(|e| in_file(e.to_string().trim_end().to_owned()))?;
    for (variable, value) in overrides(env) {
        tree.set(&variable, value).map_err(|why| ConfigError(format!("{variable}: {why}")))?;
    }
    let value = tree.read().map_err(|fault| match &fault.place {
        Some(Place::Variable(v)) => ConfigError(format!("{v}: {}", fault.message())),
        Some(Place::Span(span)) => in_file(format!("{}{}", line_and_column(text, span.start), fault.message())),
        None => in_file(fault.message()),
    });
    let value = match (value, &found) {
        (Err(e), None) => {
            return Err(ConfigError(format!(
                "there is no {default_name} here and none in {SYSTEM_DIR}; write one or name it by --config FILE ({e})"
            )));
        }
        (value, _) => value?,
    };
    let file = found.map(|(path, _)| path);
    let dir = file.as_deref().and_then(Path::parent).filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = std::path::absolute(dir).map_err(|e| ConfigError(format!("{}: {e}", dir.display())))?;
    Ok(Loaded { value, dir, file })
}

fn search([here, system]: [&Path; 2], name: &str) -> Result<Option<(PathBuf, String)>, ConfigError> {
    let (here, system) = (here.join(name), system.join(name));
    // A command that is run as a service's user is often given in a directory which that one may not enter.
    if !is_out_of_sight(&here)
        && let Some(text) = read(&here)?
    {
        return Ok(Some((here, text)));
    }
    Ok(read(&system)?.map(|text| (system, text)))
}

/// Whether nobody can say if a file is there. One that is there, and may not be read, is in sight.
fn is_out_of_sight(path: &Path) -> bool {
    use io::ErrorKind::{NotADirectory, PermissionDenied};
    std::fs::symlink_metadata(path).is_err_and(|e| matches!(e.kind(), NotADirectory | PermissionDenied))
}

fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    let bad = |why: String| ConfigError(format!("{}: {why}", path.display()));
    // Unlike data, settings may be reached through a link (configuration management makes them).
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(bad(e.to_string())),
    };
    let bytes = crate::shelf::read_all(file, path, MAX_BYTES).map_err(|e| bad(e.source.to_string()))?;
    String::from_utf8(bytes).map(Some).map_err(|_| bad("it is not UTF-8 text".to_owned()))
}

/// The overrides, in an order that does not depend on the environment's.
fn overrides(env: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut found: Vec<_> = env.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    found.sort();
    found
}

fn line_and_column(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
    format!("line {line}, column {column}: ")
}

/// The process's environment, for `load`. Values that are not UTF-8 are left out.
#[allow(clippy::disallowed_methods, reason = "the room that reads the environment")]
pub fn environment() -> Vec<(String, String)> {
    std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect()
}

/// One variable of the process's environment; an empty one counts as none.
#[allow(clippy::disallowed_methods, reason = "the room that reads the environment")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// `path` as meant by a file in `dir`.
pub fn resolve(dir: &Path, path: &Path) -> PathBuf {
    dir.join(path)
}

/// A URL as meant by a file in `dir`: `sqlite:hq.db`, `file:objects` and `inbox:drops` become
/// absolute, others stay. Part of a database's URL after `?` stays too.
pub fn resolve_url(dir: &Path, url: &str) -> String {
    let Some((scheme, rest)) = url.split_once(':') else { return url.to_owned() };
    let path = match rest.strip_prefix("//") {
        Some(path) if !path.starts_with('/') => path,
        Some(_) => return url.to_owned(),
        None => rest,
    };
    if path.is_empty() || path.starts_with(':') {
        return url.to_owned();
    }
    match scheme {
        "file" => url::Url::from_file_path(dir.join(path)).map_or_else(|()| url.to_owned(), String::from),
        "inbox" => format!("inbox:{}", dir.join(path).display()),
        // The user's part is escaped already.
        "sqlite" if path.starts_with('/') => url.to_owned(),
        "sqlite" => format!("{}/{path}", sqlite_url(dir).trim_end_matches('/')),
        _ => url.to_owned(),
    }
}

/// The URL of a SQLite file.
pub fn sqlite_url(path: &Path) -> String {
    format!("sqlite:{}", path.display().to_string().replace('%', "%25").replace('?', "%3F"))
}

/// The file of a `sqlite:` URL: up to `?`, %-escapes read. What follows it are options of other programs.
pub fn sqlite_path(url: &str) -> Option<PathBuf> {
    let path = url.strip_prefix("sqlite:")?;
    let path = path.strip_prefix("//").unwrap_or(path).split('?').next()?;
    Some(PathBuf::from(&*percent_encoding::percent_decode_str(path).decode_utf8_lossy()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;
    use serde::Deserialize;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        store: String,
        #[serde(default)]
        sources: Vec<String>,
        hq: Option<String>,
        #[serde(default)]
        serve: Serve,
        #[serde(default)]
        stream: Vec<Stream>,
    }
    #[derive(Debug, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Serve {
        listen: String,
        port: u16,
        ratio: f64,
        strict: bool,
        poll: HumanDuration,
        cache: HumanBytes,
        mode: Mode,
        data_dir: PathBuf,
    }
    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        Fast,
        Slow,
    }
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Stream {
        name: String,
    }
    impl Default for Serve {
        fn default() -> Self {
            Serve {
                listen: "127.0.0.1:1".into(),
                port: 1,
                ratio: 0.5,
                strict: false,
                poll: HumanDuration(Duration::from_secs(30)),
                cache: HumanBytes(1),
                mode: Mode::Slow,
                data_dir: "data".into(),
            }
        }
    }

    fn try_load(text: &str, env: &[(&str, &str)]) -> Result<Settings, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("relay.toml");
        std::fs::write(&path, text).unwrap();
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let loaded = load::<Settings>(Some(&path), "relay.toml", env);
        loaded.map(|l| l.value).map_err(|e| e.to_string().replace(&format!("{}/", dir.path().display()), ""))
    }

    const SAMPLE: &str = "store = \"0421\"\nsources = [\"a\"]\n[serve]\nport = 7\npoll = \"5m\"\ncache = \"64MiB\"\n[[stream]]\nname = \"price\"\n";

    #[test]
    fn a_file_is_read_and_overridden_by_type() {
        let s = try_load(SAMPLE, &[("TILLCAST_LOG", "debug"), ("TILLCASTX", "1")]).unwrap();
        assert_eq!((s.store.as_str(), s.serve.port, s.hq), ("0421", 7, None));
        assert_eq!((s.serve.poll.0, s.serve.cache.0), (Duration::from_secs(300), 64 << 20));
        assert_eq!(s.stream[0].name, "price");
        let s = try_load(
            SAMPLE,
            &[
                ("TILLCAST__STORE", "421"),
                ("TILLCAST__SOURCES", r#"["x", "y,z"]"#),
                ("TILLCAST__HQ", "1"),
                ("TILLCAST__SERVE__PORT", "80"),
                ("TILLCAST__SERVE__STRICT", "true"),
                ("TILLCAST__SERVE__RATIO", "2"),
                ("TILLCAST__SERVE__POLL", "200ms"),
                ("TILLCAST__SERVE__CACHE", "12"),
                ("TILLCAST__SERVE__MODE", "fast"),
                ("TILLCAST__SERVE__DATA_DIR", "0700"),
                ("TILLCAST__SERVE__LISTEN", "true"),
            ],
        )
        .unwrap();
        // What looks like a number or a bool stays a text where a text is wanted.
        assert_eq!((s.store.as_str(), s.hq.as_deref(), s.serve.listen.as_str()), ("421", Some("1"), "true"));
        assert_eq!(s.sources, ["x", "y,z"]);
        assert_eq!((s.serve.port, s.serve.strict, s.serve.ratio), (80, true, 2.0));
        assert_eq!((s.serve.poll.0, s.serve.cache.0), (Duration::from_millis(200), 12));
        assert_eq!((s.serve.mode, s.serve.data_dir), (Mode::Fast, "0700".into()));
    }

    #[test]
    fn an_empty_variable_unsets_what_may_be_left_out() {
        let s = try_load("store = \"1\"\nhq = \"https://x\"\n", &[("TILLCAST__HQ", "")]).unwrap();
        assert_eq!(s.hq, None);
    }

    #[test]
    fn mistakes_in_the_file_name_line_column_and_the_nearest_key() {
        let cases = [
            (
                "store = \"1\"\n[serve]\nlistn = \"x\"\n",
                "relay.toml: line 3, column 1: serve: unknown key `listn`; did you mean `listen`?",
            ),
            ("store = \"1\"\n[serve]\nzzzzzzzzz = 1\n", "unknown key `zzzzzzzzz`; known are `listen`, `port`"),
            ("store = \"1\"\n[serv]\nport = 1\n", "line 2, column 2: unknown key `serv`; did you mean `serve`?"),
            ("store = 421\n", "line 1, column 9: store: invalid type: integer `421`, expected a string"),
            (
                "store = \"1\"\n[serve]\n\nport = 70000\n",
                "line 4, column 8: serve.port: invalid value: integer `70000`, expected u16",
            ),
            ("store = \"1\"\n[serve]\npoll = \"soon\"\n", "line 3, column 8: serve.poll: `soon` is no duration"),
            (
                "store = \"1\"\n[serve]\npoll = 30\n",
                "serve.poll: invalid type: integer `30`, expected a duration such as \"30s\"",
            ),
            ("store = \"1\"\n[serve]\nmode = \"fastt\"\n", "serve.mode: unknown value `fastt`; did you mean `fast`?"),
            ("sources = []\n", "relay.toml: missing key `store`"),
            (
                "store = \"1\"\n[[stream]]\nname = \"a\"\n[[stream]]\n",
                "line 4, column 1: stream[1]: missing key `name`",
            ),
            (
                "store = \"1\"\n[[stream]]\nnane = \"a\"\n",
                "line 3, column 1: stream[0]: unknown key `nane`; did you mean `name`?",
            ),
            ("store = \"1\nx", "line 2, column 2"),
            ("store = \"1\"\nstore = \"2\"\n", "duplicate key"),
        ];
        for (text, expected) in cases {
            let e = try_load(text, &[]).unwrap_err();
            assert!(e.contains(expected), "{text}\n   {e}");
        }
    }

    #[test]
    fn mistakes_in_the_environment_name_the_variable() {
        let cases = [
            (
                "TILLCAST__SERVE__LISTN",
                "x",
                "TILLCAST__SERVE__LISTN: serve: unknown key `listn`; did you mean `listen`?",
            ),
            ("TILLCAST__SERV__LISTEN", "x", "TILLCAST__SERV__LISTEN: unknown key `serv`; did you mean `serve`?"),
            ("TILLCAST__SERVE__PORT", "many", "TILLCAST__SERVE__PORT: serve.port: `many` is not a whole number"),
            (
                "TILLCAST__SERVE__PORT",
                "70000",
                "TILLCAST__SERVE__PORT: serve.port: invalid value: integer `70000`, expected u16",
            ),
            (
                "TILLCAST__SERVE__STRICT",
                "maybe",
                "TILLCAST__SERVE__STRICT: serve.strict: `maybe` is neither true nor false",
            ),
            ("TILLCAST__SOURCES", "a,b", "TILLCAST__SOURCES: sources: `a,b` is not a list such as [\"a\", \"b\"]"),
            ("TILLCAST__SERVE", "x", "TILLCAST__SERVE: serve: it is a section; set TILLCAST__SERVE__KEY"),
            ("TILLCAST__STREAM", "[]", "TILLCAST__STREAM: a list of tables can only be set in the file"),
            ("TILLCAST__STREAM__NAME", "x", "TILLCAST__STREAM__NAME: a list of tables can only be set in the file"),
            ("TILLCAST__STORE__X", "1", "TILLCAST__STORE__X: `store` is not a section"),
            ("TILLCAST__", "1", "TILLCAST__: it names no setting"),
        ];
        for (name, value, expected) in cases {
            let e = try_load(SAMPLE, &[(name, value)]).unwrap_err();
            assert!(e.contains(expected), "{name}={value}\n   {e}");
        }
        // A bad value in the file that a variable replaces does no harm.
        assert_eq!(
            try_load("store = \"1\"\n[serve]\nport = \"x\"\n", &[("TILLCAST__SERVE__PORT", "8")]).unwrap().serve.port,
            8
        );
    }

    #[test]
    fn secrets_in_variables_are_not_quoted_when_misplaced() {
        let e = try_load(SAMPLE, &[("TILLCAST__SERVE__PASSWORD", "hunter2")]).unwrap_err();
        assert!(!e.contains("hunter2"), "{e}");
    }

    #[test]
    fn a_missing_file_says_where_it_was_looked_for() {
        let e = load::<Settings>(Some(Path::new("/no/such.toml")), "relay.toml", []).unwrap_err();
        assert_eq!(e.to_string(), "/no/such.toml: no such file");
        let e = load::<Settings>(None, "no-such-name.toml", []).unwrap_err().to_string();
        assert!(e.contains("no-such-name.toml") && e.contains("/etc/tillcast") && e.contains("--config"), "{e}");
        let env = [("TILLCAST__STORE".to_owned(), "7".to_owned())];
        let l = load::<Settings>(None, "no-such-name.toml", env).unwrap();
        assert_eq!((l.value.store.as_str(), l.file), ("7", None));
        assert!(l.dir.is_absolute());
    }

    #[test]
    fn a_directory_that_may_not_be_entered_has_no_settings_and_a_file_that_may_not_be_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let [here, system] = ["here", "system"].map(|d| dir.path().join(d));
        std::fs::create_dir(&system).unwrap();
        std::fs::write(system.join("relay.toml"), SAMPLE).unwrap();
        let found = || search([&here, &system], "relay.toml").map(|f| f.map(|(path, _)| path));
        // None there, and no directory at all.
        assert_eq!(found(), Ok(Some(system.join("relay.toml"))));
        std::fs::write(&here, "").unwrap();
        assert_eq!(found(), Ok(Some(system.join("relay.toml"))));
        std::fs::remove_file(&here).unwrap();
        std::fs::create_dir(&here).unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        std::fs::write(here.join("relay.toml"), SAMPLE).unwrap();
        mode(&here.join("relay.toml"), 0o000);
        if std::fs::read(here.join("relay.toml")).is_ok() {
            return; // Root may read and enter all.
        }
        assert!(found().unwrap_err().to_string().contains("Permission denied"));
        mode(&here, 0o000);
        assert_eq!(found(), Ok(Some(system.join("relay.toml"))));
        mode(&here, 0o700);
    }

    #[test]
    fn paths_and_urls_are_relative_to_the_file() {
        let dir = Path::new("/etc/tillcast");
        assert_eq!(resolve(dir, Path::new("schema/a.sql")), Path::new("/etc/tillcast/schema/a.sql"));
        assert_eq!(resolve(dir, Path::new("/a.sql")), Path::new("/a.sql"));
        for (url, expected) in [
            ("sqlite:hq.db", "sqlite:/etc/tillcast/hq.db"),
            ("sqlite://hq.db?mode=ro", "sqlite:/etc/tillcast/hq.db?mode=ro"),
            ("sqlite:/var/hq.db", "sqlite:/var/hq.db"),
            ("sqlite:///var/hq.db", "sqlite:///var/hq.db"),
            ("sqlite::memory:", "sqlite::memory:"),
            ("file:my objects", "file:///etc/tillcast/my%20objects"),
            ("file:///srv/objects", "file:///srv/objects"),
            ("inbox:drops", "inbox:/etc/tillcast/drops"),
            ("inbox:/srv/inbox", "inbox:/srv/inbox"),
            ("postgres://u@h/db", "postgres://u@h/db"),
            ("s3://bucket/prefix", "s3://bucket/prefix"),
            ("https://cdn.example.com/x", "https://cdn.example.com/x"),
            ("objects", "objects"),
        ] {
            assert_eq!(resolve_url(dir, url), expected, "{url}");
        }
        assert_eq!(resolve_url(Path::new("/a?b%c"), "sqlite:x.db"), "sqlite:/a%3Fb%25c/x.db");
    }

    #[test]
    fn a_sqlite_url_names_the_file_that_was_meant() {
        for dir in ["/srv", "/a?b%c", "/my shop", "/größe 100%"] {
            let dir = Path::new(dir);
            for (url, file) in [
                ("sqlite:hq.db", "hq.db"),
                ("sqlite:hq.db?mode=ro", "hq.db"),
                ("sqlite://hq.db?mode=ro&cache=shared", "hq.db"),
                ("sqlite:50%25%20off?.db", "50% off"),
                ("sqlite:höhe.db", "höhe.db"),
            ] {
                assert_eq!(sqlite_path(&resolve_url(dir, url)), Some(dir.join(file)), "{dir:?} {url}");
            }
            assert_eq!(sqlite_path(&sqlite_url(&dir.join("x"))), Some(dir.join("x")));
        }
        assert_eq!(sqlite_path("sqlite:///var/hq.db"), Some("/var/hq.db".into()));
        assert_eq!(sqlite_path("postgres://h/d"), None);
    }
}
