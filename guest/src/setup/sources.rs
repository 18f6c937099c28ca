//! Where the machine's own apt gets Debian from, read from its sources in either form.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A mirror of Debian's main archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mirror {
    pub(super) uri: String,
    /// The keys that sign it, where the source names a file.
    pub(super) keyring: Option<String>,
}

/// The first mirror of Debian that the sources below `etc` (as /etc/apt) name.
pub(super) fn mirror(etc: &Path) -> Option<Mirror> {
    let mut files: Vec<PathBuf> = fs::read_dir(etc.join("sources.list.d"))
        .map(|entries| entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect())
        .unwrap_or_default();
    files.sort();
    files.insert(0, etc.join("sources.list"));
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        match file.extension()?.to_str()? {
            "sources" => in_stanzas(&text),
            "list" => in_lines(&text),
            _ => None,
        }
    })
}

/// One source: its kind, places, suites, components and keys.
#[derive(Debug, Default)]
struct Source<'a> {
    uris: Vec<&'a str>,
    suites: Vec<&'a str>,
    components: Vec<&'a str>,
    keyring: Option<&'a str>,
    /// Binary packages, and not switched off.
    binary: bool,
}

impl Source<'_> {
    /// Other archives have components of their own, or suites without a Debian release's name.
    fn mirror(&self) -> Option<Mirror> {
        const RELEASES: [&str; 8] =
            ["stable", "bullseye", "bookworm", "trixie", "forky", "testing", "sid", "unstable"];
        let release = self.suites.iter().any(|suite| {
            RELEASES.contains(suite)
                || suite.strip_suffix("-backports").is_some_and(|suite| RELEASES.contains(&suite))
        });
        let uri = *self.uris.first()?;
        (self.binary && release && self.components.contains(&"main"))
            .then(|| Mirror { uri: uri.to_owned(), keyring: self.keyring.map(str::to_owned) })
    }
}

/// The form of `*.list`: `deb [options] URI suite component...`.
fn in_lines(text: &str) -> Option<Mirror> {
    text.lines().find_map(|line| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let source = Source {
            uris: words.next().into_iter().collect(),
            suites: words.next().into_iter().collect(),
            components: words.collect(),
            keyring: options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")),
            binary: true,
        };
        source.mirror()
    })
}

/// The form of `*.sources`: stanzas of `Field: words`, which go on in lines that begin with a blank.
fn in_stanzas(text: &str) -> Option<Mirror> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let mut source = Source { binary: false, ..Source::default() };
        let mut enabled = true;
        let mut field = String::new();
        for line in stanza {
            let words = if line.starts_with([' ', '\t']) {
                *line
            } else {
                let (name, words) = line.split_once(':')?;
                field = name.trim().to_ascii_lowercase();
                words
            };
            let mut words = words.split_whitespace();
            match field.as_str() {
                "types" => source.binary |= words.any(|word| word == "deb"),
                "uris" => source.uris.extend(words),
                "suites" => source.suites.extend(words),
                "components" => source.components.extend(words),
                "enabled" => enabled = words.next() != Some("no"),
                // A key written into the stanza itself has no path.
                "signed-by" => {
                    source.keyring =
                        source.keyring.or_else(|| words.next().filter(|word| word.starts_with('/')));
                }
                _ => {}
            }
        }
        source.mirror().filter(|_| enabled)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror_of(uri: &str, keyring: Option<&str>) -> Option<Mirror> {
        Some(Mirror { uri: uri.to_owned(), keyring: keyring.map(str::to_owned) })
    }

    #[test]
    fn stanzas_of_other_archives_or_switched_off_are_passed_over() {
        let text = "Types: deb\nURIs: https://node.example/x\nSuites: nodistro\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: trixie\nComponents: main\n\n\
                    Types: deb deb-src\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm\n bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n";
        assert_eq!(in_stanzas(text), mirror_of("http://a.example/debian", Some("/usr/share/keyrings/k.gpg")));
    }

    #[test]
    fn stanzas_of_sources_and_of_security_alone_give_none() {
        assert_eq!(in_stanzas("Types: deb-src\nURIs: http://a/\nSuites: trixie\nComponents: main\n"), None);
        assert_eq!(
            in_stanzas("Types: deb\nURIs: http://a/\nSuites: trixie-security\nComponents: main\n"),
            None
        );
    }

    #[test]
    fn lines_with_and_without_options_are_read() {
        assert_eq!(
            in_lines("# deb http://no/ trixie main\ndeb http://a.example/debian trixie main contrib"),
            mirror_of("http://a.example/debian", None)
        );
        assert_eq!(
            in_lines("deb [arch=amd64 signed-by=/k.gpg] mirror+file:/etc/m.list bookworm main"),
            mirror_of("mirror+file:/etc/m.list", Some("/k.gpg"))
        );
        assert_eq!(in_lines("deb https://packages.example/apt cloud-sdk-bookworm main"), None);
    }
}
