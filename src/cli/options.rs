//! What was typed: arguments and environment, checked for form only.
//!
//! The syntax is that of Go's `flag` package (control-plane spec 1.2): one dash or two, `-x value` or `-x=value`, booleans
//! with `=` only, and nothing is read after the first argument that is not a flag.

use std::collections::BTreeMap;

use getopts::{Fail, HasArg, Occur, ParsingStyle};

use super::flags::{self, Fate, Flag, Kind};

/// Values by flag name. Absent is the default.
#[derive(Debug, Default)]
pub(super) struct Options {
    given: BTreeMap<&'static str, Vec<String>>,
    /// What an operator should hear about once the log is up.
    pub(super) notes: Vec<String>,
}

impl Options {
    /// Reads the arguments (without the program's name), then the environment for what they leave open.
    ///
    /// # Errors
    /// One line: which flag, what is wrong with it.
    pub(super) fn read(
        args: &[String],
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let mut options = Self::default();
        let matches = parser().parse(args).map_err(|fail| explain(&fail))?;
        for flag in flags::all() {
            let default_when_bare = if flag.kind == Kind::Bool { "true" } else { "" };
            let mut values: Vec<(usize, String)> = matches.opt_strs_pos(flag.name);
            let bare = matches.opt_positions(flag.name);
            if values.len() < bare.len() {
                let valued: Vec<usize> = values.iter().map(|(at, _)| *at).collect();
                values.extend(
                    bare.into_iter()
                        .filter(|at| !valued.contains(at))
                        .map(|at| (at, default_when_bare.to_owned())),
                );
                values.sort();
            }
            if !values.is_empty() {
                options.take(flag, values.into_iter().map(|(_, value)| value).collect())?;
            }
        }
        if let Some(first) = matches.free.first() {
            options.notes.push(format!(
                "argument {first:?} and what follows it are not read: they do not begin with a dash"
            ));
        }
        options.read_environment(variable);
        Ok(options)
    }

    fn take(&mut self, flag: &'static Flag, values: Vec<String>) -> Result<(), String> {
        for value in &values {
            check(flag, value).map_err(|wrong| format!("-{}: {wrong}", flag.name))?;
        }
        match flag.fate {
            Fate::Works => drop(self.given.insert(flag.name, values)),
            Fate::Ignored => self.notes.push(format!("-{} has no effect", flag.name)),
            Fate::Later => {
                // switched off is what this version does anyway
                if values
                    .last()
                    .is_some_and(|last| flag.kind != Kind::Bool || bool_of(last) == Some(true))
                {
                    return Err(format!("-{} is not supported by this version", flag.name));
                }
            }
        }
        Ok(())
    }

    /// A bad value in the environment leaves the default in force, as upstream does, but is said.
    fn read_environment(&mut self, variable: &dyn Fn(&str) -> Option<String>) {
        for flag in flags::all().filter(|flag| !flag.is_command()) {
            let name = flag.variable();
            let Some(value) = variable(&name).filter(|value| !value.is_empty()) else { continue };
            if self.given.contains_key(flag.name) {
                continue;
            }
            if let Err(wrong) = self.take(flag, vec![value]) {
                self.notes.push(format!("{name} in the environment is ignored: {wrong}"));
            }
        }
    }

    /// The value in force. The last one given wins.
    pub(super) fn text(&self, name: &str) -> &str {
        let given = self.given.get(name).and_then(|values| values.last());
        given.map_or_else(|| flags::find(name).map_or("", |flag| flag.default), String::as_str)
    }

    /// All values of a flag that may be repeated.
    pub(super) fn list(&self, name: &str) -> Vec<String> {
        self.given.get(name).cloned().unwrap_or_default()
    }

    pub(super) fn bool(&self, name: &str) -> bool {
        bool_of(self.text(name)).unwrap_or(false)
    }

    pub(super) fn int(&self, name: &str) -> i64 {
        int_of(self.text(name)).unwrap_or(0)
    }
}

fn parser() -> getopts::Options {
    let mut parser = getopts::Options::new();
    parser.long_only(true).parsing_style(ParsingStyle::StopAtFirstFree);
    for flag in flags::all() {
        let (short, long) = if flag.name.len() == 1 { (flag.name, "") } else { ("", flag.name) };
        let has_value = if flag.kind == Kind::Bool { HasArg::Maybe } else { HasArg::Yes };
        parser.opt(short, long, "", "", has_value, Occur::Multi);
    }
    parser.optflagmulti("h", "", "");
    parser
}

fn explain(fail: &Fail) -> String {
    match fail {
        Fail::ArgumentMissing(name) => format!("-{name} needs a value"),
        Fail::UnrecognizedOption(name) => {
            let near = flags::all().map(|flag| flag.name).min_by_key(|known| distance(known, name));
            let hint = near
                .filter(|known| distance(known, name) <= 3)
                .map(|known| format!(", did you mean -{known}?"));
            format!(
                "unknown flag -{name}{}",
                hint.unwrap_or_else(|| "; -help lists what there is".into())
            )
        }
        other => other.to_string(),
    }
}

/// Edit distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.bytes().enumerate() {
            let cost = corner + usize::from(from != to);
            corner = row[j + 1];
            row[j + 1] = cost.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn check(flag: &Flag, value: &str) -> Result<(), String> {
    let shown = if flag.secret { "the value given".into() } else { format!("{value:?}") };
    match flag.kind {
        Kind::Text | Kind::List => Ok(()),
        Kind::Bool if bool_of(value).is_some() => Ok(()),
        Kind::Bool => Err(format!("{shown} is neither true nor false")),
        Kind::Int if int_of(value).is_some() => Ok(()),
        Kind::Int => Err(format!("{shown} is not an integer")),
    }
}

/// Go's `strconv.ParseBool`.
fn bool_of(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Go's `strconv.ParseInt` with base 0: prefixes, legacy octal, underscores between digits.
fn int_of(text: &str) -> Option<i64> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => ("-", &text[1..]),
        b'+' => ("", &text[1..]),
        _ => ("", text),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, &lower[..]),
    };
    let prefixed = radix != 10;
    let digits = if prefixed { digits.strip_prefix('_').unwrap_or(digits) } else { digits };
    if digits.starts_with(['_', '+', '-']) || digits.ends_with('_') || digits.contains("__") {
        return None;
    }
    // base 0 takes underscores only where a prefix says what the digits are, or between decimal ones
    i64::from_str_radix(&format!("{sign}{}", digits.replace('_', "")), radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str], env: &[(&str, &str)]) -> Result<Options, String> {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        Options::read(&args, &|name| {
            env.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn one_dash_or_two_with_or_without_equals() {
        let typed = [
            "-v",
            "10",
            "-subnet-file",
            "/x",
            "-etcd-prefix=/y",
            "--etcd-cafile=/z",
            "--public-ip",
            "1.2.3.4",
        ];
        let options = read(&typed, &[]).unwrap();
        assert_eq!(options.int("v"), 10);
        assert_eq!(options.text("subnet-file"), "/x");
        assert_eq!(options.text("etcd-prefix"), "/y");
        assert_eq!(options.text("etcd-cafile"), "/z");
        assert_eq!(options.text("public-ip"), "1.2.3.4");
        assert_eq!(options.text("data-dir"), "/var/lib/flannel");
    }

    #[test]
    fn booleans() {
        for (args, value) in [
            (&["-ip-masq"][..], true),
            (&["--ip-masq=T"], true),
            (&["-ip-masq=false"], false),
            (&["-ip-masq", "-ip-masq=0"], false),
            (&["-ip-masq=0", "-ip-masq"], true),
            (&[], false),
        ] {
            assert_eq!(read(args, &[]).unwrap().bool("ip-masq"), value, "{args:?}");
        }
        let options = read(&["-ip-masq", "false", "-v", "3"], &[]).unwrap();
        assert!(options.bool("ip-masq"));
        assert_eq!(options.int("v"), 0, "what follows the first positional argument is not read");
        assert!(options.notes[0].contains("\"false\""));
    }

    #[test]
    fn repeats() {
        let options =
            read(&["-iface", "eth0", "--iface=", "-iface=10.0.0.1", "-v=1", "-v=2"], &[]).unwrap();
        assert_eq!(options.list("iface"), ["eth0", "", "10.0.0.1"]);
        assert_eq!(options.int("v"), 2);
    }

    #[test]
    fn integers_are_gos() {
        for (text, value) in [
            ("10", 10),
            ("0x1F", 31),
            ("017", 15),
            ("0o17", 15),
            ("0b101", 5),
            ("1_000", 1000),
            ("-5", -5),
            ("+5", 5),
            ("0", 0),
        ] {
            assert_eq!(int_of(text), Some(value), "{text}");
        }
        for text in
            ["", "-", "abc", "0x", "09", "1__0", "_1", "1_", "1.0", "--5", "99999999999999999999"]
        {
            assert_eq!(int_of(text), None, "{text}");
        }
    }

    #[test]
    fn wrong_arguments_are_one_clear_line() {
        for (args, says) in [
            (
                &["-etcd-endpoint=x"][..],
                "unknown flag -etcd-endpoint, did you mean -etcd-endpoints?",
            ),
            (&["--frobnicate"], "unknown flag -frobnicate; -help lists"),
            (&["-ip-masq=maybe"], "-ip-masq: \"maybe\" is neither true nor false"),
            (&["-v=x"], "-v: \"x\" is not an integer"),
            (&["-etcd-prefix"], "-etcd-prefix needs a value"),
            (&["-watch-networks"], "-watch-networks is not supported by this version"),
            (&["--listen=:8888"], "-listen is not supported by this version"),
        ] {
            let error = read(args, &[]).unwrap_err();
            assert!(error.contains(says), "{args:?}: {error}");
            assert!(!error.contains('\n'));
        }
        assert!(read(&["-watch-networks=false", "-logtostderr"], &[]).is_ok());
    }

    #[test]
    fn environment_stands_in_for_what_was_not_typed() {
        let env = [
            ("FLANNELD_ETCD_PREFIX", "/env"),
            ("FLANNELD_IP_MASQ", "true"),
            ("FLANNELD_IFACE", "eth0,eth1"),
            ("FLANNELD_SUBNET_FILE", ""),
            ("FLANNELD_HEALTHZ_PORT", "many"),
            ("FLANNELD_WATCH_NETWORKS", "true"),
            ("FLANNELD_VERSION", "true"),
        ];
        let options = read(&["-etcd-prefix=/typed"], &env).unwrap();
        assert_eq!(options.text("etcd-prefix"), "/typed");
        assert!(options.bool("ip-masq"));
        assert_eq!(options.list("iface"), ["eth0,eth1"]);
        assert_eq!(options.text("subnet-file"), "/run/flannel/subnet.env");
        assert_eq!(options.int("healthz-port"), 0);
        assert!(!options.bool("version"));
        assert!(
            options
                .notes
                .iter()
                .any(|note| note.contains("FLANNELD_HEALTHZ_PORT") && note.contains("many"))
        );
        assert!(options.notes.iter().any(|note| note.contains("FLANNELD_WATCH_NETWORKS")));
    }
}
