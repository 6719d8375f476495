//! The `flanneld` program. Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot work, 2 for a wrong command line.

use std::io::Write;
use std::process::ExitCode;

use flanneld::{agent, cli};

fn main() -> ExitCode {
    let args: Vec<String> =
        std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let (settings, cleans_up) = match cli::parse(&args, &|name| std::env::var(name).ok()) {
        Ok(cli::Command::Run(settings)) => (*settings, false),
        Ok(cli::Command::CleanUp(settings)) => (*settings, true),
        Ok(cli::Command::Print(text)) => {
            // a reader that has gone away is no error of ours
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            let _ = writeln!(std::io::stderr(), "flanneld: {wrong}");
            return ExitCode::from(2);
        }
    };
    cli::init_log(settings.verbosity);
    let result = if cleans_up {
        agent::clean_up(&settings)
    } else {
        agent::run(settings, std::env::var_os("NOTIFY_SOCKET"))
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
