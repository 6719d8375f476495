//! The traffic rules against the real kernel and the real `iptables`, `ip6tables` and `nft`, each test in a network
//! namespace of its own. Needs root.
#![allow(clippy::disallowed_methods)] // the tests read the clock
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

mod life;

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use flanneld::family::Family;
use flanneld::firewall::change::Ours;
use flanneld::firewall::choose::Mode;
use flanneld::firewall::legacy::{Finished, Legacy, Tools};
use flanneld::firewall::plan::{self, Share};
use flanneld::firewall::site::{Site, Style};
use flanneld::firewall::{Event, Options};

use life::{
    Life, NETWORKS, SUBNETS, both, host, many_rules_of_others, options, run, run_command, share,
    tools, try_run,
};

/// What `iptables -S` must show for a family (firewall spec 1.3 and 1.4).
fn reference(at: usize, masquerade: bool, forward: bool, random: &str) -> (String, String) {
    let (c, p) = (NETWORKS[at], SUBNETS[at]);
    let multicast = ["224.0.0.0/4", "ff00::/8"][at];
    let masq = r#"-m comment --comment "flanneld masq" -j"#;
    let nat = if masquerade {
        format!(
            r#"-N FLANNEL-POSTRTG
-A POSTROUTING {masq} FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} RETURN
-A FLANNEL-POSTRTG -s {p} -d {c} {masq} RETURN
-A FLANNEL-POSTRTG -s {c} -d {p} {masq} RETURN
-A FLANNEL-POSTRTG ! -s {c} -d {p} {masq} RETURN
-A FLANNEL-POSTRTG -s {c} ! -d {multicast} {masq} MASQUERADE{random}
-A FLANNEL-POSTRTG ! -s {c} -d {c} {masq} MASQUERADE{random}
"#
        )
    } else {
        String::new()
    };
    let fwd = r#"-m comment --comment "flanneld forward" -j"#;
    let filter = if forward {
        format!(
            "-N FLANNEL-FWD\n-A FORWARD {fwd} FLANNEL-FWD\n-A FLANNEL-FWD -s {c} {fwd} ACCEPT\n-A FLANNEL-FWD -d {c} {fwd} ACCEPT\n"
        )
    } else {
        String::new()
    };
    (nat, filter)
}

/// What `nft list ruleset` must show for a family (firewall spec 2.2 and 2.3, with the mark masked and N4 right).
fn nft_reference(at: usize, masquerade: bool, forward: bool, random: &str) -> String {
    let (c, p) = (NETWORKS[at], SUBNETS[at]);
    let (ip, multicast) = [("ip", "224.0.0.0/4"), ("ip6", "ff00::/8")][at];
    let table = ["flannel-ipv4", "flannel-ipv6"][at];
    let mut chains = Vec::new();
    if masquerade {
        chains.push(format!(
            "\tchain postrtg {{\n\t\tcomment \"chain to manage traffic masquerading by flannel\"\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\tmeta mark & 0x00004000 == 0x00004000 return\n\
             \t\t{ip} saddr {p} {ip} daddr {c} return\n\
             \t\t{ip} saddr {c} {ip} daddr {p} return\n\
             \t\t{ip} saddr != {c} {ip} daddr {p} return\n\
             \t\t{ip} saddr {c} {ip} daddr != {multicast} masquerade{random}\n\
             \t\t{ip} saddr != {c} {ip} daddr {c} masquerade{random}\n\t}}\n"
        ));
    }
    if forward {
        chains.push(format!(
            "\tchain forward {{\n\t\tcomment \"chain to accept flannel traffic\"\n\t\ttype filter hook forward priority filter; policy accept;\n\
             \t\t{ip} saddr {c} accept\n\t\t{ip} daddr {c} accept\n\t}}\n"
        ));
    }
    if chains.is_empty() {
        return String::new();
    }
    format!("table {ip} {table} {{\n\tcomment \"rules for {table}\"\n{}}}\n", chains.join("\n"))
}

/// Rules and user chains of a table, without the policies.
fn listed(program: &str, table: &str) -> String {
    run(&format!("{program} -t {table} -S 2>/dev/null | grep -v '^-P' || true"))
}

/// What is wrong with what the tools show, if something is.
fn differs(
    mode: Option<Mode>,
    families: [bool; 2],
    masquerade: bool,
    forward: bool,
    random: bool,
) -> Option<String> {
    let (ipt, nft) = if random { (" --random-fully", " fully-random") } else { ("", "") };
    let mut expected_nft = String::new();
    for at in [0, 1] {
        let base = ["iptables", "ip6tables"][at];
        for (variant, of) in [("nft", Mode::IptablesNft), ("legacy", Mode::IptablesLegacy)] {
            let here = mode == Some(of) && families[at];
            let (nat, filter) = reference(at, masquerade && here, forward && here, ipt);
            for (table, expected) in [("nat", nat), ("filter", filter)] {
                let program = format!("{base}-{variant}");
                if variant == "legacy"
                    && !run(&format!("{program}-save")).contains(&format!("*{table}"))
                    && expected.is_empty()
                {
                    continue;
                }
                let found = listed(&program, table);
                if found != expected {
                    return Some(format!(
                        "{program} -t {table} shows:\n{found}but should show:\n{expected}"
                    ));
                }
            }
        }
        if mode == Some(Mode::Nftables) && families[at] {
            expected_nft += &nft_reference(at, masquerade, forward, nft);
        }
    }
    let mut found = String::new();
    for (family, table) in [("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6")] {
        found += &try_run(&format!("nft list table {family} {table} 2>&1")).unwrap_or_default();
    }
    // chains stand in the order in which they were made
    let chains = |text: &str| {
        let mut chains: Vec<String> = text
            .split("\n}\n")
            .flat_map(|table| table.split("\tchain "))
            .map(|chain| chain.trim().to_owned())
            .collect();
        chains.sort();
        chains
    };
    (chains(&found) != chains(&expected_nft))
        .then(|| format!("nft shows:\n{found}but should show:\n{expected_nft}"))
}

const MODES: [Mode; 3] = [Mode::IptablesNft, Mode::Nftables, Mode::IptablesLegacy];

/// Every mode, family and option: what the tools show is the reference list, and nothing else.
#[test]
fn the_tools_show_the_reference_lists() {
    for mode in MODES {
        for (families, random) in
            [([true, false], true), ([false, true], false), ([true, true], true)]
        {
            for (masquerade, forward) in
                [(true, true), (true, false), (false, true), (false, false)]
            {
                thread::spawn(move || {
                    host();
                    let options =
                        Options { masquerade, forward, fully_random: random, ..options(mode) };
                    let mut life = Life::begin(options);
                    life.set([share(0).filter(|_| families[0]), share(1).filter(|_| families[1])]);
                    life.settle();
                    if let Some(wrong) = differs(Some(mode), families, masquerade, forward, random)
                    {
                        panic!("{mode:?} {families:?} {masquerade} {forward}: {wrong}");
                    }
                })
                .join()
                .unwrap();
            }
        }
    }
}

trait Judged {
    fn assert_right(&self, mode: Mode);
    fn healed(&self) -> Vec<String>;
}

impl Judged for Life {
    #[track_caller]
    fn assert_right(&self, mode: Mode) {
        if let Some(wrong) = differs(Some(mode), [true; 2], true, true, true) {
            panic!("{mode:?}: {wrong}");
        }
    }

    fn healed(&self) -> Vec<String> {
        let by = |event: &Event| match event {
            Event::Healed { by, .. } => Some(by.clone().unwrap_or_default()),
            _ => None,
        };
        self.events.iter().filter_map(by).collect()
    }
}

/// In namespaces of its own for each mode, rules in place.
fn in_each_mode(test: fn(Mode, &mut Life)) {
    for mode in MODES {
        let body = move || {
            host();
            let mut life = Life::begin(options(mode));
            life.set(both());
            life.settle();
            life.assert_right(mode);
            test(mode, &mut life);
        };
        thread::spawn(body).join().unwrap();
    }
}

/// What others do to the rules, by mode. A `;` separates commands.
fn damages(mode: Mode) -> Vec<String> {
    let iptables = |v4: &str, v6: &str| {
        let masq = r#"-m comment --comment "flanneld masq" -j RETURN"#;
        vec![
            format!("{v4} -t nat -F; {v4} -F"),
            format!("{v4} -t nat -F FLANNEL-POSTRTG"),
            format!("{v6} -D FLANNEL-FWD 1"),
            format!(
                "{v4} -t nat -D FLANNEL-POSTRTG 1; {v4} -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq}"
            ),
            format!("{v4} -t nat -A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 {masq}"),
            format!("{v4} -t nat -I FLANNEL-POSTRTG -s 10.244.1.7 -j ACCEPT"),
            format!("{v4} -I FORWARD -j FLANNEL-FWD"),
            format!("{v6} -t nat -D POSTROUTING 1"),
            format!("{v6} -t nat -F; {v6} -t nat -X; {v4} -F; {v4} -X"),
        ]
    };
    match mode {
        Mode::IptablesNft => {
            let mut damages = iptables("iptables-nft", "ip6tables-nft");
            // as firewalld and `nft -f` of a whole rule set do
            damages.push("nft flush ruleset".into());
            damages.push("nft delete table ip nat; nft delete table ip6 filter".into());
            damages
        }
        Mode::IptablesLegacy => iptables("iptables-legacy", "ip6tables-legacy"),
        Mode::Nftables => [
            "nft flush ruleset",
            "nft delete table ip flannel-ipv4",
            "nft flush chain ip flannel-ipv4 postrtg",
            "nft delete chain ip6 flannel-ipv6 forward",
            "nft add rule ip flannel-ipv4 postrtg ip saddr 10.244.0.0/16 accept",
            "nft insert rule ip6 flannel-ipv6 postrtg meta mark and 0x4000 == 0x4000 return",
            "nft insert rule ip flannel-ipv4 forward tcp dport 80 drop",
            "nft flush chain ip flannel-ipv4 forward; nft add rule ip flannel-ipv4 forward ip daddr 10.244.0.0/16 accept; \
             nft add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept",
        ]
        .map(String::from)
        .to_vec(),
    }
}

/// Flushed, deleted, reordered, doubled, foreign: back within a second, and the log can say who it was.
#[test]
fn damage_is_repaired_within_a_second() {
    in_each_mode(|mode, life| {
        for damage in damages(mode) {
            run(&damage);
            assert!(
                differs(Some(mode), [true; 2], true, true, true).is_some(),
                "{damage} does nothing"
            );
            let before = life.healed().len();
            // a damage of several steps may be seen after the first one, so what counts is what the tools show at the end
            let took = life.run_until(&damage, |life| {
                life.healed().len() > before && life.firewall.is_in_place()
            });
            assert!(took < Duration::from_secs(1), "{damage}: {took:?}");
            life.assert_right(mode);
        }
        let culprits = life.healed();
        if mode != Mode::IptablesLegacy {
            assert!(
                culprits.iter().all(|by| by.starts_with("nft (process")
                    || by.starts_with("iptables-nft (process")
                    || by.starts_with("ip6tables-nft (process")
                    || by.starts_with("xtables-nft-mult (process")),
                "{culprits:?}"
            );
        }
        assert!(
            !life.events.iter().any(|event| matches!(event, Event::Refused { .. })),
            "{:?}",
            life.events
        );
    });
}

/// A new life finds everything in place and writes nothing; so does one that takes over from a Go flanneld, whose rules
/// were written by `iptables-restore`.
#[test]
fn what_is_right_is_not_written_again() {
    in_each_mode(|mode, _| {
        let mut next = Life::begin(options(mode));
        next.set(both());
        next.settle();
        next.assert_right(mode);
        assert_eq!(next.firewall.written(), 0);
        assert!(!next.commands.iter().any(|name| name.ends_with("restore")), "{:?}", next.commands);
    });
    for (mode, variant) in [(Mode::IptablesNft, "nft"), (Mode::IptablesLegacy, "legacy")] {
        host();
        for at in [0, 1] {
            let (nat, filter) = reference(at, true, true, " --random-fully");
            let restore = ["iptables", "ip6tables"][at];
            let path =
                std::env::temp_dir().join(format!("flanneld-go-{}-{at}", std::process::id()));
            let chains = |text: &str| {
                text.replace("-N ", ":")
                    .replace("POSTRTG\n-A POST", "POSTRTG - [0:0]\n-A POST")
                    .replace("FWD\n-A FORW", "FWD - [0:0]\n-A FORW")
            };
            fs::write(
                &path,
                format!("*nat\n{}COMMIT\n*filter\n{}COMMIT\n", chains(&nat), chains(&filter)),
            )
            .unwrap();
            run(&format!("{restore}-{variant}-restore --noflush < {}", path.display()));
            fs::remove_file(path).unwrap();
        }
        let mut life = Life::begin(options(mode));
        life.set(both());
        life.settle();
        life.assert_right(mode);
        assert_eq!(life.firewall.written(), 0);
        assert!(!life.commands.iter().any(|name| name.ends_with("restore")), "{:?}", life.commands);
    }
}

/// The checks that a Go flanneld, and scripts, make.
#[test]
fn iptables_finds_our_rules() {
    in_each_mode(|mode, _| {
        let variant = match mode {
            Mode::IptablesNft => "nft",
            Mode::IptablesLegacy => "legacy",
            Mode::Nftables => return,
        };
        for at in [0, 1] {
            let program = format!("{}-{variant}", ["iptables", "ip6tables"][at]);
            let (nat, filter) = reference(at, true, true, " --random-fully");
            for (table, rules) in [("nat", nat), ("filter", filter)] {
                for rule in rules.lines().filter_map(|line| line.strip_prefix("-A ")) {
                    run(&format!("{program} -t {table} -C {rule}"));
                }
            }
        }
    });
}

/// Nothing happens while nothing happens: no transaction, and no program but the reader of legacy rules.
#[test]
fn idle_is_idle() {
    in_each_mode(|mode, life| {
        let (written, commands) = (life.firewall.written(), life.commands.len());
        life.idle(Duration::from_secs(1));
        assert_eq!(life.firewall.written(), written);
        let ran = &life.commands[commands..];
        if mode == Mode::IptablesLegacy {
            // two families, five times a second
            assert!(ran.len() <= 12 && ran.iter().all(|name| name.ends_with("save")), "{ran:?}");
        } else {
            assert_eq!(ran, [""; 0]);
        }
    });
}

/// From each mode to each other one: the new rules are there, and nothing of the old ones.
#[test]
fn switching_modes_leaves_nothing_behind() {
    for from in MODES {
        for to in MODES.into_iter().filter(|to| *to != from) {
            let body = move || {
                host();
                let mut life = Life::begin(options(from));
                life.set(both());
                life.settle();
                drop(life);
                let mut life = Life::begin(options(to));
                life.set(both());
                life.settle();
                life.assert_right(to);
                // an option that is off now removes what an earlier life has set
                drop(life);
                // another mode and another network at once
                let other = Share {
                    network: "10.9.0.0/16".parse().unwrap(),
                    subnet: "10.9.3.0/24".parse().unwrap(),
                };
                let mut life = Life::begin(options(from));
                let past = NETWORKS.map(|net| net.parse().unwrap());
                life.firewall.set([Some(other), None], &past, false, Instant::now());
                life.settle();
                let all = run(
                    "nft list ruleset 2>/dev/null; iptables-legacy-save; ip6tables-legacy-save",
                );
                assert!(
                    !all.contains("10.244.") && all.contains("10.9.3.0/24"),
                    "{from:?} {to:?}: {all}"
                );
                drop(life);
                let mut life = Life::begin(options(to));
                life.firewall.set(both(), &["10.9.0.0/16".parse().unwrap()], false, Instant::now());
                life.settle();
                life.assert_right(to);
                drop(life);
                let mut life = Life::begin(Options { masquerade: false, ..options(to) });
                life.set([share(0), None]);
                life.firewall.set(
                    [share(0), None],
                    &[NETWORKS[1].parse().unwrap()],
                    false,
                    Instant::now(),
                );
                life.settle();
                if let Some(wrong) = differs(Some(to), [true, false], false, true, true) {
                    panic!("{from:?} {to:?}: {wrong}");
                }
            };
            thread::spawn(body).join().unwrap();
        }
    }
}

/// `flanneld -cleanup` in all modes, with rules of several networks, beside rules of others.
#[test]
fn cleaning_up_takes_all_that_is_flannels() {
    in_each_mode(|mode, _| {
        run("iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
        run("nft add table ip mine");
        let mut second = Life::begin(options(mode));
        second.set([
            Some(Share {
                network: "10.9.0.0/16".parse().unwrap(),
                subnet: "10.9.3.0/24".parse().unwrap(),
            }),
            None,
        ]);
        second.settle();
        drop(second);
        let mut last = Life::begin(Options { mode: None, ..options(mode) });
        last.firewall.clean_up(Vec::new(), Instant::now());
        last.run_until("nothing is left", |life| life.firewall.is_clean());
        let nothing = [
            run("nft list ruleset 2>/dev/null"),
            run("iptables-legacy-save; ip6tables-legacy-save"),
        ];
        assert!(
            !nothing.iter().any(|text| text.to_ascii_lowercase().contains("flannel")),
            "{nothing:?}"
        );
        assert!(nothing[0].contains("172.17.0.0/16") && nothing[0].contains("table ip mine"));
    });
}

/// Two agents with two networks on one host, both of them awake: each has its rules, and neither writes for ever.
#[test]
fn two_networks_do_not_fight() {
    in_each_mode(|mode, life| {
        let mut second = Life::begin(options(mode));
        second.set([
            Some(Share {
                network: "10.9.0.0/16".parse().unwrap(),
                subnet: "10.9.3.0/24".parse().unwrap(),
            }),
            None,
        ]);
        second.settle();
        let calm = |life: &mut Life, second: &mut Life| {
            for _ in 0..800 {
                life.turn();
                second.turn();
                thread::sleep(Duration::from_millis(1));
            }
            assert!(life.firewall.is_in_place() && second.firewall.is_in_place());
        };
        calm(life, &mut second);
        let before = (
            life.firewall.written(),
            second.firewall.written(),
            life.healed().len(),
            second.healed().len(),
        );
        calm(life, &mut second);
        let after = (
            life.firewall.written(),
            second.firewall.written(),
            life.healed().len(),
            second.healed().len(),
        );
        assert_eq!(before, after);
        let shown = match mode {
            Mode::IptablesNft => listed("iptables-nft", "nat"),
            Mode::IptablesLegacy => listed("iptables-legacy", "nat"),
            Mode::Nftables => run("nft list chain ip flannel-ipv4 postrtg"),
        };
        assert_eq!(shown.matches("10.9.3.0/24").count(), 3, "{shown}");
        assert_eq!(shown.matches("10.244.1.0/24").count(), 3, "{shown}");
        // of iptables value and mask, of nft too; once for both networks
        assert_eq!(shown.matches("4000").count(), 2, "{shown}");
    });
}

/// What versions before 0.20 wrote, with and without remarks, goes; the network of an earlier life, too.
#[test]
fn leftovers_of_old_versions_go() {
    for (mode, program) in [
        (Mode::IptablesNft, "iptables-nft"),
        (Mode::IptablesLegacy, "iptables-legacy"),
        (Mode::Nftables, "iptables-legacy"),
        (Mode::Nftables, "iptables-nft"),
    ] {
        for remark in ["", "-m comment --comment 'flanneld masq'"] {
            let body = move || {
                host();
                let (c, p) = (NETWORKS[0], SUBNETS[0]);
                for rule in [
                    format!("POSTROUTING -s {c} -d {c} {remark} -j RETURN"),
                    format!(
                        "POSTROUTING -s {c} ! -d 224.0.0.0/4 {remark} -j MASQUERADE --random-fully"
                    ),
                    format!("POSTROUTING ! -s {c} -d {p} {remark} -j RETURN"),
                    format!("POSTROUTING ! -s {c} -d {c} {remark} -j MASQUERADE"),
                    format!("POSTROUTING -s {c} ! -d {c} -j MASQUERADE"),
                ] {
                    run(&format!("{program} -t nat -A {rule}"));
                }
                run(&format!(
                    "{program} -A FORWARD -s {c} -m comment --comment 'flanneld forward' -j ACCEPT"
                ));
                run(&format!(
                    "{program} -t nat -N FLANNEL; {program} -t nat -A FLANNEL -d {c} -j ACCEPT; {program} -t nat -A POSTROUTING -s {c} -j FLANNEL"
                ));
                let mut life = Life::begin(options(mode));
                life.set(both());
                life.settle();
                let left = listed(program, "nat");
                assert!(
                    left.contains(&format!("-A POSTROUTING -s {c} ! -d {c} -j MASQUERADE\n")),
                    "the operator's own: {left}"
                );
                run(&format!("{program} -t nat -D POSTROUTING -s {c} ! -d {c} -j MASQUERADE"));
                life.assert_right(mode);
            };
            thread::spawn(body).join().unwrap();
        }
    }
}

/// Ten thousand rules and chains of others: they are not touched, and a start and a repair are quick.
#[test]
fn many_rules() {
    for mode in MODES {
        let body = move || {
            host();
            let legacy = mode == Mode::IptablesLegacy;
            let program = if legacy { "iptables-legacy" } else { "iptables-nft" };
            let show = many_rules_of_others(program);
            let before = run(&show);
            assert_eq!(before.lines().count(), 15_000);
            let mut life = Life::begin(options(mode));
            life.set([share(0), None]);
            let start = life.settle();
            assert_eq!(before, run(&show));
            let damage = match mode {
                Mode::Nftables => "nft delete table ip flannel-ipv4".to_owned(),
                _ => format!("{program} -t nat -F FLANNEL-POSTRTG"),
            };
            run(&damage);
            let repaired =
                |life: &mut Life| !life.healed().is_empty() && life.firewall.is_in_place();
            let repair = life.run_until(&damage, repaired);
            assert_eq!(before, run(&show));
            // the bench has the figures; this is what no machine may need
            let bound = Duration::from_secs(if legacy { 5 } else { 1 });
            assert!(start < bound && repair < bound, "{mode:?}: {start:?} {repair:?}");
        };
        thread::spawn(body).join().unwrap();
    }
}

/// Somebody who undoes everything at once is answered more and more slowly.
#[test]
fn a_quarrel_is_not_won_by_speed() {
    host();
    let mut life = Life::begin(options(Mode::IptablesNft));
    life.set([share(0), None]);
    life.settle();
    for _ in 0..40 {
        run("iptables-nft -t nat -F FLANNEL-POSTRTG");
        let written = life.firewall.written();
        let start = Instant::now();
        while life.firewall.written() == written && start.elapsed() < Duration::from_millis(600) {
            life.turn();
        }
        if life.firewall.written() > written {
            life.settle();
        }
        if life.events.iter().any(|event| matches!(event, Event::Quarrel { .. })) {
            break;
        }
    }
    let quarrels = life.events.iter().find_map(|event| match event {
        Event::Quarrel { by, .. } => Some(by.clone()),
        _ => None,
    });
    assert!(quarrels.is_some_and(|by| by.contains("iptables-nft")), "{:?}", life.events);
    life.settle();
}

/// The policy of Docker's FORWARD chain stays as it is, and is said where rules of ours cannot help against it.
#[test]
fn the_policy_of_forward_is_not_ours() {
    for mode in [Mode::IptablesNft, Mode::Nftables] {
        let body = move || {
            host();
            run("iptables-nft -P FORWARD DROP");
            let mut life = Life::begin(options(mode));
            life.set(both());
            life.settle();
            assert!(run("iptables-nft -S FORWARD").contains("-P FORWARD DROP"));
            let told = life.events.contains(&Event::ForwardDrops(Family::V4));
            assert_eq!(told, mode == Mode::Nftables);
            life.assert_right(mode);
        };
        thread::spawn(body).join().unwrap();
    }
}

/// Somebody holds the lock: a back-off, an error when it lasts, and the rules when it is free.
#[test]
fn a_busy_lock_is_waited_for() {
    host();
    let mut life = Life::begin(options(Mode::IptablesLegacy));
    let holder = fs::File::create(&life.lock).unwrap();
    holder.lock().unwrap();
    life.set([share(0), None]);
    life.run_until("the lock is said to be busy", |life| {
        life.events.iter().any(|event| matches!(event, Event::Refused { reason, .. } if reason.contains("xtables lock")))
    });
    assert!(!life.firewall.is_in_place());
    assert!(life.firewall.trouble().unwrap().reason.contains("fuser"));
    drop(holder);
    life.settle();
    if let Some(wrong) = differs(Some(Mode::IptablesLegacy), [true, false], true, true, true) {
        panic!("{wrong}");
    }
}

/// `/run` can be read-only, or the program broken: one clear reason, and other tries.
#[test]
fn programs_that_fail_are_said() {
    host();
    let mut life = Life::begin(options(Mode::IptablesLegacy));
    life.lock = PathBuf::from("/proc/nowhere/xtables.lock");
    life.set([share(0), None]);
    life.run_until("the reason", |life| {
        life.events.iter().any(|event| matches!(event, Event::Refused { reason, .. } if reason.contains("mount the host's /run/xtables.lock")))
    });
    let now = Instant::now();
    let missing =
        Tools { save: "/nonexistent/save".into(), restore: "/nonexistent/restore".into() };
    let mut legacy = Legacy::new([Some(missing), None], [true, false], 7, now);
    assert!(legacy.poll_command(now).is_some());
    let complaint = "start /nonexistent/save: No such file or directory (os error 2)".to_owned();
    legacy.handle_finished(&Finished { status: None, output: Vec::new(), complaint }, now);
    assert!(
        matches!(legacy.poll_event(), Some(Event::Refused { reason, .. }) if reason.contains("No such file"))
    );
}

/// A rule that somebody adds between the reading and the writing of legacy rules stays, and so do its neighbours.
#[test]
fn legacy_rules_of_others_survive_a_race() {
    host();
    let now = Instant::now();
    let wants = || -> Vec<_> {
        let sites = Site::all(Style::Iptables).filter(|site| site.family == Family::V4);
        sites.map(|site| (site, plan::rules(site, share(0).unwrap(), true))).collect()
    };
    let ours = || Ours { networks: vec![share(0).unwrap().network], ..Ours::default() };
    let mut legacy = Legacy::new(tools(), [true, false], 7, now);
    legacy.set(wants(), ours(), None, now);
    let lock = std::env::temp_dir().join(format!("flanneld-race-{}", std::process::id()));
    let settle = |legacy: &mut Legacy, interfere: &str| {
        let mut interfere = Some(interfere).filter(|command| !command.is_empty());
        for step in 0..20 {
            let now = now + Duration::from_secs(step);
            while let Some(command) = legacy.poll_command(now) {
                if !command.input.is_empty()
                    && let Some(interfere) = interfere.take()
                {
                    run(interfere);
                }
                legacy.handle_finished(&run_command(&command, &lock), now);
            }
        }
        assert!(legacy.is_in_place(), "{:?}", legacy.trouble());
    };
    settle(&mut legacy, "");
    run("iptables-legacy -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
    run(
        "iptables-legacy -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG",
    );
    legacy.set(wants(), ours(), None, now);
    settle(&mut legacy, "iptables-legacy -t nat -I POSTROUTING -s 10.99.0.0/16 -j RETURN");
    let shown = listed("iptables-legacy", "nat");
    for (rule, count) in [("172.17.0.0/16", 1), ("10.99.0.0/16", 1), ("-j FLANNEL-POSTRTG", 1)] {
        assert_eq!(shown.matches(rule).count(), count, "{rule}: {shown}");
    }
    let _ = fs::remove_file(lock);
}

/// More rules than fit a socket's usual buffer are deleted in one go.
#[test]
fn thousands_of_doubles() {
    host();
    let mut life = Life::begin(options(Mode::IptablesNft));
    life.set(both());
    life.settle();
    let jump = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";
    let path = std::env::temp_dir().join(format!("flanneld-doubles-{}", std::process::id()));
    fs::write(&path, format!("*filter\n{}COMMIT\n", jump.repeat(8000))).unwrap();
    run(&format!("iptables-nft-restore --noflush < '{}'", path.display()));
    fs::remove_file(path).unwrap();
    life.run_until("they are gone", |life| {
        !life.healed().is_empty() && life.firewall.is_in_place()
    });
    life.assert_right(Mode::IptablesNft);
}

/// A rule of the operator's that leads into a chain of ours neither keeps other rules from being set, nor is it touched.
#[test]
fn jumps_of_others_into_our_chains() {
    for jump in [
        "-I FORWARD -i docker0 -j FLANNEL-FWD",
        "-N DOCKER-USER; iptables-nft -A DOCKER-USER -j FLANNEL-FWD",
    ] {
        for end in [Some(Mode::Nftables), None] {
            let body = move || {
                host();
                let mut life = Life::begin(options(Mode::IptablesNft));
                life.set(both());
                life.settle();
                run(&format!("iptables-nft {jump}"));
                life.idle(Duration::from_millis(100));
                assert!(life.firewall.is_in_place());
                drop(life);
                let mut life = Life::begin(options(end.unwrap_or(Mode::IptablesNft)));
                match end {
                    Some(_) => life.set(both()),
                    None => life.firewall.clean_up(Vec::new(), Instant::now()),
                }
                life.settle();
                let left = run("iptables-nft-save; ip6tables-nft-save");
                let own = left.lines().filter(|line| line.contains("FLANNEL")).count();
                let stuck = |event: &Event| matches!(event, Event::Stuck(chain) if chain.contains("FLANNEL-FWD"));
                assert_eq!(own, 2, "the chain and the jump: {left}");
                assert!(life.events.iter().any(stuck), "{:?}", life.events);
                let nft = run("nft list ruleset 2>/dev/null");
                assert_eq!(nft.contains("table ip flannel-ipv4"), end.is_some());
            };
            thread::spawn(body).join().unwrap();
        }
    }
}

/// Chains and tables that are there and have no effect are as bad as none.
#[test]
fn chains_that_do_not_work_are_made_anew() {
    in_each_mode(|mode, life| {
        let damages: &[&str] = match mode {
            Mode::Nftables => &[
                "nft delete chain ip flannel-ipv4 postrtg; nft add chain ip flannel-ipv4 postrtg",
                "nft 'chain ip flannel-ipv4 forward { policy drop; }'",
                "nft 'delete chain ip6 flannel-ipv6 forward; \
                 add chain ip6 flannel-ipv6 forward { type filter hook forward priority 5; }'",
                "nft 'add table ip flannel-ipv4 { flags dormant; }'",
                "nft 'delete table ip flannel-ipv4; \
                 add table ip flannel-ipv4 { comment \"rules for flannel-ipv4\"; flags dormant; }'",
            ],
            Mode::IptablesNft => &["nft flush ruleset; nft 'add table ip nat; \
                 add chain ip nat FLANNEL-POSTRTG { type nat hook postrouting priority 7; }'"],
            Mode::IptablesLegacy => return,
        };
        for damage in damages {
            run(damage);
            let before = life.healed().len();
            life.run_until(damage, |life| {
                life.healed().len() > before && life.firewall.is_in_place()
            });
            life.assert_right(mode);
        }
        if mode == Mode::IptablesNft {
            run("nft flush ruleset; nft add table ip nat; nft add chain ip nat POSTROUTING");
            life.run_until("it is said", |life| {
                life.firewall
                    .trouble()
                    .is_some_and(|trouble| trouble.reason.contains("ip nat POSTROUTING"))
            });
            assert!(!life.firewall.is_in_place());
            run("nft flush ruleset");
            life.settle();
            life.assert_right(mode);
        }
    });
}

/// Nowhere to put the rules: those of an earlier life are better than none.
#[test]
fn rules_that_work_are_not_removed_for_nothing() {
    host();
    let mut life = Life::begin(options(Mode::IptablesNft));
    life.set(both());
    life.settle();
    drop(life);
    let mut life = Life::without_programs(options(Mode::IptablesLegacy));
    life.set(both());
    life.idle(Duration::from_millis(300));
    assert!(!life.firewall.is_in_place() && life.firewall.trouble().is_some());
    if let Some(wrong) = differs(Some(Mode::IptablesNft), [true; 2], true, true, true) {
        panic!("{wrong}");
    }
}

/// Two agents whose networks were swapped: each removes what is left of its own past, once, and then lets the other be.
#[test]
fn a_past_network_can_be_anothers() {
    for mode in MODES {
        let body = move || {
            host();
            let other = Share {
                network: "10.9.0.0/16".parse().unwrap(),
                subnet: "10.9.3.0/24".parse().unwrap(),
            };
            let shares = [share(0).unwrap(), other];
            let mut lives = [Life::begin(options(mode)), Life::begin(options(mode))];
            for (at, life) in lives.iter_mut().enumerate() {
                let past = [shares[1 - at].network];
                life.firewall.set([Some(shares[at]), None], &past, false, Instant::now());
            }
            let mut idle = |time: Duration| {
                let start = Instant::now();
                while start.elapsed() < time {
                    lives.iter_mut().for_each(Life::turn);
                    thread::sleep(Duration::from_millis(1));
                }
                assert!(lives.iter().all(|life| life.firewall.is_in_place()));
                lives
                    .iter()
                    .map(|life| {
                        life.firewall.written() + u64::try_from(life.healed().len()).unwrap()
                    })
                    .sum::<u64>()
            };
            let before = idle(Duration::from_secs(2));
            assert_eq!(before, idle(Duration::from_secs(1)), "they go on");
        };
        thread::spawn(body).join().unwrap();
    }
}

/// Docker comes after us, as it must.
#[test]
fn a_policy_that_drops_is_noticed_later() {
    host();
    let mut life = Life::begin(options(Mode::Nftables));
    life.set(both());
    life.settle();
    run("iptables-nft -P FORWARD DROP");
    life.run_until("it is said", |life| life.events.contains(&Event::ForwardDrops(Family::V4)));
}

/// Our jumps go to the end, behind Docker's and kube-proxy's, and stay where they are when those come again.
#[test]
fn the_place_beside_docker_and_kube_proxy() {
    for (mode, variant) in [(Mode::IptablesNft, "nft"), (Mode::IptablesLegacy, "legacy")] {
        let body = move || {
            host();
            let theirs = |at: &str| {
                run(&format!(
                    "iptables-{variant} -{at} FORWARD -j DOCKER-USER; iptables-{variant} -{at} FORWARD -o docker0 -j DOCKER; \
                     iptables-{variant} -t nat -{at} POSTROUTING -j KUBE-POSTROUTING"
                ));
            };
            run(&format!(
                "iptables-{variant} -N DOCKER-USER; iptables-{variant} -N DOCKER; iptables-{variant} -t nat -N KUBE-POSTROUTING; \
                 iptables-{variant} -P FORWARD DROP"
            ));
            theirs("A");
            let mut life = Life::begin(options(mode));
            life.set(both());
            life.settle();
            let last = |table: &str, chain: &str| {
                let shown = listed(&format!("iptables-{variant}"), table);
                let mut rules =
                    shown.lines().filter(|line| line.starts_with(&format!("-A {chain} ")));
                rules.next_back().unwrap().to_owned()
            };
            assert!(last("filter", "FORWARD").ends_with("-j FLANNEL-FWD"));
            assert!(last("nat", "POSTROUTING").ends_with("-j FLANNEL-POSTRTG"));
            let (written, commands) = (life.firewall.written(), life.commands.len());
            // Docker and kube-proxy start again: once in front of us, once behind
            theirs("I");
            theirs("A");
            life.idle(Duration::from_millis(700));
            assert_eq!(life.firewall.written(), written);
            assert!(!life.commands[commands..].iter().any(|name| name.ends_with("restore")));
            assert!(life.firewall.is_in_place());
        };
        thread::spawn(body).join().unwrap();
    }
}

/// A table that another program keeps for itself: what can be set is set, and what cannot is said.
#[test]
fn a_part_that_is_refused_holds_up_no_other() {
    host();
    // the table is its owner's for as long as that one lives
    let mut owner = std::process::Command::new("nft")
        .arg("-i")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut input = owner.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"add table ip filter { flags owner; }\n").unwrap();
    let shown = || run("nft list tables 2>/dev/null");
    let start = Instant::now();
    while !shown().contains("ip filter") && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(5));
    }
    let mut life = Life::begin(options(Mode::IptablesNft));
    life.set(both());
    life.run_until("it is said", |life| life.firewall.trouble().is_some());
    life.idle(Duration::from_millis(100));
    let nat = listed("iptables-nft", "nat");
    assert_eq!(nat, reference(0, true, true, " --random-fully").0);
    assert!(life.firewall.trouble().is_some_and(|trouble| trouble.reason.contains("ip filter")));
    drop(input);
    owner.wait().unwrap();
    life.settle();
    life.assert_right(Mode::IptablesNft);
}
