//! Many things in one line: the first of them, and how many more.

use std::fmt::Display;

/// Things that a line names.
pub const NAMED: usize = 20;

/// The first [`NAMED`] of them with `between` each, and how many more.
pub fn some<T: Display>(all: impl IntoIterator<Item = T>, between: &str) -> String {
    let mut all = all.into_iter();
    let named: Vec<String> = all.by_ref().take(NAMED).map(|one| one.to_string()).collect();
    let named = named.join(between);
    match all.count() {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_named_is_counted() {
        assert_eq!(some(["a"; 0], ", "), "");
        assert_eq!(some([1, 2], ", "), "1, 2");
        assert_eq!(some(0..20, "").len(), 30);
        let told = some(0..23, "; ");
        assert!(told.starts_with("0; 1; ") && told.ends_with("; 19 and 3 more"), "{told}");
    }
}
