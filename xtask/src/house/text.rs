//! Rules on what a text file says. The words are put together here, so that this file keeps the rules itself.

/// Lines of a source file before its tests.
const LINES: usize = 650;

/// Notes to oneself that were left behind.
const LEFTOVERS: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];

/// Code that is not there yet, and tests that do not run.
const UNDONE: [&str; 3] = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];

/// Folders of the machine that something was written on.
const MACHINE: [&str; 5] = [
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/tmp/", "wt-"),
    concat!("/tmp/", "target-"),
    concat!("../sh", "ared/"),
];

/// Hosts of package registries: where packages come from is the user's setting.
const REGISTRIES: [&str; 5] = [
    concat!("crates", ".io"),
    concat!("py", "pi.org"),
    concat!("python", "hosted.org"),
    concat!("npm", "js.org"),
    concat!("proxy.", "golang.org"),
];

/// What is wrong with a file, with name and line.
pub(super) fn faults(name: &str, text: &str) -> Vec<String> {
    let lock = name.ends_with("Cargo.lock");
    let rust = name.ends_with(".rs");
    let mut faults = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let mut fault = |what: String| faults.push(format!("{name}:{}: {what}", index + 1));
        for word in LEFTOVERS.into_iter().filter(|word| has_word(line, word)) {
            fault(format!("{word} left behind"));
        }
        for path in MACHINE.into_iter().filter(|path| has_path(line, path)) {
            fault(format!("{path} is a folder of one machine"));
        }
        if !lock {
            for host in REGISTRIES.into_iter().filter(|host| line.contains(host)) {
                fault(format!("{host} is a registry's host"));
            }
        }
        if rust {
            for call in UNDONE.into_iter().filter(|call| line.contains(call)) {
                fault(format!("{call} is not done"));
            }
        }
    }
    if rust {
        faults.extend(
            unreasoned(text).map(|line| format!("{name}:{line}: a lint is allowed without a reason")),
        );
        let lines = lines_before_tests(text);
        if lines > LINES && !holds_only_tests(name) {
            faults.push(format!("{name}: {lines} lines before its tests, and {LINES} is the most"));
        }
    }
    faults
}

/// Whether the word stands by itself.
fn has_word(line: &str, word: &str) -> bool {
    let part = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        !before.ends_with(part) && !after.starts_with(part)
    })
}

/// Whether the path begins there, rather than being a part of another.
fn has_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        !line[..at].ends_with(|letter: char| letter.is_alphanumeric() || "._-}>)".contains(letter))
    })
}

/// The lines of attributes that allow a lint and do not say why.
fn unreasoned(text: &str) -> impl Iterator<Item = usize> {
    text.match_indices(concat!("al", "low("))
        .filter(|(at, _)| {
            let line = text[..*at].rsplit('\n').next().unwrap_or("").trim_start();
            line == "#["
                || line == "#!["
                || line.starts_with("#[cfg_attr(")
                || line.starts_with("#![cfg_attr(")
        })
        .filter(|(at, _)| {
            let rest = &text[*at..];
            let attribute = rest.split_once(']').map_or(rest, |(attribute, _)| attribute);
            !attribute.contains("reason")
        })
        .map(|(at, _)| text[..at].matches('\n').count() + 1)
}

/// Lines before the module of tests, all if there is none.
fn lines_before_tests(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let begins_tests = |index: &usize| {
        let attribute = lines[*index];
        let mut item = lines[index + 1..].iter().skip_while(|line| line.starts_with("#["));
        attribute.starts_with("#[cfg(")
            && attribute.contains("test")
            && item.next().is_some_and(|item| item.contains("mod ") && item.ends_with('{'))
    };
    (0..lines.len()).find(begins_tests).unwrap_or(lines.len())
}

fn holds_only_tests(name: &str) -> bool {
    name.split('/').any(|part| part == "tests") || name.ends_with("tests.rs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_found_as_words_only() {
        for word in LEFTOVERS {
            assert_eq!(
                faults("a.md", &format!("ok\n// {word}: later")),
                [format!("a.md:2: {word} left behind")]
            );
            assert!(faults("a.md", &format!("{word}x and _{word}")).is_empty());
        }
    }

    #[test]
    fn undone_code_is_found_in_rust_only() {
        for call in UNDONE {
            assert_eq!(faults("a.rs", call), [format!("a.rs:1: {call} is not done")]);
            assert!(faults("a.md", call).is_empty());
        }
    }

    #[test]
    fn machine_paths_are_found_where_they_begin() {
        for path in MACHINE {
            assert_eq!(faults("a", &format!("see {path}x")).len(), 1, "{path}");
            assert!(faults("a", &format!("https://host.org{path}x")).is_empty(), "{path}");
        }
    }

    #[test]
    fn registries_are_found_but_in_lock_files() {
        for host in REGISTRIES {
            assert_eq!(faults("README.md", host).len(), 1, "{host}");
            assert!(faults("fuzz/Cargo.lock", host).is_empty(), "{host}");
        }
    }

    #[test]
    fn allowed_lints_need_a_reason() {
        let allow = concat!("al", "low");
        let bad = [format!("#[{allow}(dead_code)]"), format!("#![cfg_attr(loom, {allow}(unused))]")];
        for text in bad {
            assert_eq!(faults("a.rs", &text), ["a.rs:1: a lint is allowed without a reason"]);
        }
        let good = [
            format!("#[{allow}(dead_code, reason = \"so\")]"),
            format!("#[{allow}(\n    dead_code,\n    reason = \"so\"\n)]"),
            format!("self.{allow}(x)"),
        ];
        for text in good {
            assert!(faults("a.rs", &text).is_empty(), "{text}");
        }
    }

    #[test]
    fn long_files_are_found_by_their_lines_before_the_tests() {
        let code = "fn f() {}\n".repeat(LINES);
        assert!(faults("a.rs", &code).is_empty());
        let tests = "#[cfg(all(test, not(loom)))]\nmod tests {\n}\n";
        assert!(faults("a.rs", &format!("{code}{tests}")).is_empty());
        assert_eq!(faults("a.rs", &format!("{code}\n{tests}")).len(), 1);
        assert!(faults("tests/a.rs", &format!("{code}\n")).is_empty());
        let used_by_tests = format!("#[cfg(test)]\nuse std::fmt;\n{code}");
        assert_eq!(faults("a.rs", &used_by_tests).len(), 1);
    }
}
