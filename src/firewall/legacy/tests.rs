//! The state machine, with programs that fail in all ways.

#![allow(clippy::disallowed_methods)] // the tests read the clock

use super::*;
use crate::firewall::plan::{self, Share};
use crate::firewall::site::{Site, Style};

fn legacy(now: Instant) -> Legacy {
    let tools = || Some(Tools { save: "save".into(), restore: "restore".into() });
    let mut legacy = Legacy::new([tools(), tools()], [true; 2], 7, now);
    let v4 =
        Share { network: "10.5.0.0/16".parse().unwrap(), subnet: "10.5.7.0/24".parse().unwrap() };
    let v6 = Share {
        network: "fd00:5::/48".parse().unwrap(),
        subnet: "fd00:5:0:7::/64".parse().unwrap(),
    };
    let share = |family| if family == Family::V4 { v4 } else { v6 };
    let wants = Site::all(Style::Iptables)
        .map(|site| (site, plan::rules(site, share(site.family), true)))
        .collect();
    legacy.set(wants, Ours::default(), Some(Duration::from_secs(5)), now);
    legacy
}

fn finished(status: i32, complaint: &str) -> Finished {
    Finished { status: Some(status), output: Vec::new(), complaint: complaint.to_owned() }
}

/// Lets the reader find nothing, up to the next write.
fn write(legacy: &mut Legacy, now: Instant) -> Command {
    for _ in 0..4 {
        let command = legacy.poll_command(now).expect("something to do");
        if !command.input.is_empty() {
            return command;
        }
        legacy.handle_finished(&finished(0, ""), now);
    }
    panic!("nothing is written");
}

#[test]
fn programs_that_cannot_wait_are_not_asked_to() {
    for complaint in [
        "iptables-restore: invalid option -- 'w'\nTry `iptables-restore -h' for more information.",
        "iptables-restore: unrecognized option: w",
        "iptables-legacy-restore: invalid option -- 'w'\nCan't open 1: No such file or directory",
    ] {
        let now = Instant::now();
        let mut legacy = legacy(now);
        assert_eq!(write(&mut legacy, now).args, ["--noflush", "-w", "1"]);
        legacy.handle_finished(&finished(2, complaint), now);
        assert_eq!(write(&mut legacy, now).args, ["--noflush"], "{complaint}");
        assert!(legacy.trouble().is_none());
    }
}

#[test]
fn programs_without_fully_random_ports() {
    let now = Instant::now();
    let mut legacy = legacy(now);
    assert!(write(&mut legacy, now).input.contains("--random-fully"));
    let complaint = "iptables-restore v1.6.0: unknown option \"--random-fully\"";
    legacy.handle_finished(&finished(2, complaint), now);
    assert!(!write(&mut legacy, now).input.contains("--random-fully"));
}

#[test]
fn a_family_that_fails_does_not_hold_up_the_other() {
    let now = Instant::now();
    let mut legacy = legacy(now);
    let mut written = 0;
    for step in 0..200u32 {
        let now = now + Duration::from_millis(100) * step;
        while let Some(command) = legacy.poll_command(now) {
            // IPv4 comes first
            let v6 = command.input.contains("fd00:5::/48");
            written += usize::from(v6);
            let fails = !command.input.is_empty() && !v6;
            let complaint = if fails { "iptables-restore: line 2 failed" } else { "" };
            legacy.handle_finished(&finished(i32::from(fails), complaint), now);
            if written > 3 {
                break;
            }
        }
    }
    assert!(written > 3);
    assert!(legacy.trouble().is_some_and(|trouble| trouble.reason.contains("for IPv4")));
}

#[test]
fn a_chain_that_cannot_be_removed_is_left_empty() {
    let now = Instant::now();
    let tools = Tools { save: "save".into(), restore: "restore".into() };
    let mut legacy = Legacy::new([Some(tools), None], [true, false], 7, now);
    let wants = Site::all(Style::Iptables).map(|site| (site, Vec::new())).collect();
    legacy.set(wants, Ours { everything: true, ..Ours::default() }, None, now);
    let rule = "-A FLANNEL-FWD -j ACCEPT\n";
    let filter = |rule: &str| Finished {
        status: Some(0),
        output: format!("*filter\n:FORWARD ACCEPT [0:0]\n:FLANNEL-FWD - [0:0]\n{rule}COMMIT\n")
            .into(),
        complaint: String::new(),
    };
    legacy.poll_command(now).unwrap();
    legacy.handle_finished(&filter(rule), now);
    let command = write(&mut legacy, now);
    assert!(command.input.contains("-F FLANNEL-FWD\n-X FLANNEL-FWD\n"), "{}", command.input);
    legacy.handle_finished(&finished(1, "iptables-restore: line 4 failed"), now);
    assert_eq!(legacy.poll_event(), None, "what was read may have been old");
    let now = now + Duration::from_secs(1);
    legacy.poll_command(now).unwrap();
    legacy.handle_finished(&filter(rule), now);
    assert!(write(&mut legacy, now).input.contains("-X FLANNEL-FWD"));
    legacy.handle_finished(&finished(1, "iptables-restore: line 4 failed"), now);
    assert!(
        matches!(legacy.poll_event(), Some(Event::Stuck(chain)) if chain.contains("FLANNEL-FWD"))
    );
    legacy.poll_command(now).unwrap();
    legacy.handle_finished(&filter(rule), now);
    let command = write(&mut legacy, now);
    assert_eq!(command.input, "*filter\n-F FLANNEL-FWD\nCOMMIT\n");
    legacy.handle_finished(&finished(0, ""), now);
    legacy.poll_command(now).unwrap();
    legacy.handle_finished(&filter(""), now);
    assert!(legacy.is_clean() && legacy.poll_command(now).is_none());
}

#[test]
fn a_quarrel_is_not_won_by_speed() {
    let now = Instant::now();
    let mut legacy = legacy(now);
    let mut commands = 0;
    for second in 0..60u64 {
        // whatever is written, the reader finds nothing
        while legacy.poll_command(now + Duration::from_secs(second)).is_some() {
            commands += 1;
            legacy.handle_finished(&finished(0, ""), now + Duration::from_secs(second));
        }
    }
    assert!((20..120).contains(&commands), "{commands}");
    let quarrel = |event| matches!(event, Event::Quarrel { .. });
    assert!(std::iter::from_fn(|| legacy.poll_event()).any(quarrel));
}

#[test]
fn missing_programs_are_said() {
    let now = Instant::now();
    let mut legacy = Legacy::new([None, None], [false; 2], 7, now);
    let site = Site::all(Style::Iptables).next().unwrap();
    let share =
        Share { network: "10.5.0.0/16".parse().unwrap(), subnet: "10.5.7.0/24".parse().unwrap() };
    let wants = vec![(site, plan::rules(site, share, true))];
    legacy.set(wants, Ours::default(), Some(Duration::from_secs(5)), now);
    let said = legacy.poll_event();
    assert!(
        matches!(&said, Some(Event::Refused { reason, .. }) if reason.contains("iptables-legacy-restore for IPv4")),
        "{said:?}"
    );
    assert!(!legacy.is_in_place() && legacy.trouble().is_some());
}
