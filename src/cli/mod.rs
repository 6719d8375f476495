//! The command line and the environment: what the operator wants, checked, with one clear line for what cannot be.

mod flags;
mod log;
mod options;
pub mod settings;

use std::fmt::Write as _;

use self::flags::{GROUPS, Kind};
pub use self::log::init as init_log;
use self::options::Options;
pub use self::settings::Settings;

/// What the process is to do.
#[derive(Debug)]
pub enum Command {
    /// Run the daemon.
    Run(Box<Settings>),
    /// Remove what every flannel has made on this host, and exit.
    CleanUp(Box<Settings>),
    /// Print this text and exit.
    Print(String),
}

/// Reads the arguments (without the program's name) and the environment.
///
/// # Errors
/// One line that says which flag, what is wrong, and what would be right.
pub fn parse(
    args: &[String],
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Command, String> {
    let options = Options::read(args, variable)?;
    if options.bool("help") {
        return Ok(Command::Print(help()));
    }
    if options.bool("version") {
        return Ok(Command::Print(format!("{}\n", env!("CARGO_PKG_VERSION"))));
    }
    let settings = Box::new(Settings::new(&options, variable)?);
    Ok(if options.bool("cleanup") { Command::CleanUp(settings) } else { Command::Run(settings) })
}

/// The usage text: every flag that works, by purpose.
fn help() -> String {
    const COLUMN: usize = 32;
    let mut text = String::from(
        "flanneld gives this host a subnet and carries packets between the hosts' subnets.\n\n\
         Usage: flanneld [-flag=value ...]\n\n\
         Each flag can be given as an environment variable, too: -etcd-prefix is FLANNELD_ETCD_PREFIX.\n",
    );
    for (title, flags) in GROUPS {
        let _ = write!(text, "\n{title}\n");
        for flag in *flags {
            let value = match flag.kind {
                Kind::Bool => "",
                Kind::Int => "=N",
                Kind::Text | Kind::List => "=TEXT",
            };
            let left = format!("  -{}{value}", flag.name);
            let default = match flag.default {
                "" | "false" => String::new(),
                default => format!(" (default {default})"),
            };
            let _ = writeln!(text, "{left:COLUMN$} {}{default}", flag.help);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Command, String> {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        parse(&args, &|_| None)
    }

    #[test]
    fn help_and_version_come_before_everything() {
        let Ok(Command::Print(help)) = parsed(&["--help", "-etcd-api=v9"]) else { panic!() };
        assert!(help.contains("\n  -etcd-prefix=TEXT"), "{help}");
        assert!(help.lines().all(|line| line.len() < 170), "{help}");
        let Ok(Command::Print(version)) = parsed(&["-version"]) else { panic!() };
        assert_eq!(version.trim(), env!("CARGO_PKG_VERSION"));
        assert!(parsed(&["-etcd-api=v9"]).is_err());
    }

    #[test]
    fn the_manual_describes_every_flag() {
        let manual = include_str!("../../man/flanneld.8").replace('\\', "");
        for flag in GROUPS.iter().flat_map(|(_, flags)| *flags) {
            assert!(
                manual.contains(&format!("-{}", flag.name)),
                "-{} is not in man/flanneld.8",
                flag.name
            );
        }
    }
}
