//! Settings. The first byte says whose: `h` headquarters', `r` a relay's, `a` a register's. After a line `---` the rest
//! are variables of the environment, `TILLCAST__SECTION__KEY=value`.

use proto::config::{ConfigError, Loaded};
use serde::Serialize;
use std::path::{Path, PathBuf};

thread_local! {
    static DIR: tempfile::TempDir = crate::scratch_dir();
}

type Variables = Vec<(String, String)>;

pub fn config(data: &[u8]) {
    let Some((whose, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let (toml, variables) = crate::halves(text);
    let variables: Variables =
        variables.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    DIR.with(|dir| match whose {
        b'h' => holds(dir.path(), toml, &variables, |f, v| hq_publisher::config::load(Some(f), v)),
        b'r' => holds(dir.path(), toml, &variables, |f, v| store_relay::config::load(Some(f), v)),
        b'a' => holds(dir.path(), toml, &variables, |f, v| pos_agent::config::Config::load(Some(f), v)),
        _ => {}
    });
}

/// Mistakes are told in some lines with the file's or the variable's name; what is taken can be written and read
/// again, and says the same (but for secrets, which are never written).
fn holds<T: Serialize + std::fmt::Debug>(
    dir: &Path,
    toml: &str,
    variables: &Variables,
    load: impl Fn(&Path, Variables) -> Result<Loaded<T>, ConfigError>,
) {
    let file: PathBuf = dir.join("settings.toml");
    std::fs::write(&file, toml).unwrap();
    let loaded = match load(&file, variables.clone()) {
        Ok(loaded) => loaded.value,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    let written = toml::to_string(&loaded).unwrap();
    if written.contains('…') {
        return;
    }
    std::fs::write(&file, &written).unwrap();
    let again = load(&file, Variables::new()).unwrap_or_else(|e| panic!("{e}: {written}"));
    assert_eq!(format!("{:?}", again.value), format!("{loaded:?}"), "{written}");
}
