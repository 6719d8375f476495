//! What the traffic rules cost: a start and a repair beside ten thousand rules of others, and a look at rules that are right,
//! held against the checks that the Go flanneld makes every five seconds.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

#[path = "../tests/life/mod.rs"]
mod life;

use std::thread;
use std::time::{Duration, Instant};

use flanneld::firewall::Event;
use flanneld::firewall::choose::Mode;
use life::{Life, host, many_rules_of_others, options, run, share};

const ROUNDS: usize = 7;

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// Milliseconds of a first start, of a start that finds everything, and of a repair.
fn figures(mode: Mode, crowded: bool) -> [f64; 3] {
    let program = if mode == Mode::IptablesLegacy { "iptables-legacy" } else { "iptables-nft" };
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..ROUNDS {
        let round = move || {
            host();
            if crowded {
                many_rules_of_others(program);
            }
            let start = |times: &mut Vec<Duration>| {
                let begin = Instant::now();
                let mut life = Life::begin_in_use(options(mode), crowded);
                life.set([share(0), None]);
                life.settle();
                times.push(begin.elapsed());
                life
            };
            let mut found: [Vec<Duration>; 3] = Default::default();
            drop(start(&mut found[0]));
            let mut life = start(&mut found[1]);
            run(&match mode {
                Mode::Nftables => "nft delete table ip flannel-ipv4".to_owned(),
                _ => format!("{program} -t nat -F FLANNEL-POSTRTG"),
            });
            let healed = |event: &Event| matches!(event, Event::Healed { .. });
            found[2].push(life.run_until("repair", |life| {
                life.events.iter().any(healed) && life.firewall.is_in_place()
            }));
            found
        };
        for (all, new) in times.iter_mut().zip(thread::spawn(round).join().unwrap()) {
            all.extend(new);
        }
    }
    times.map(median)
}

/// Milliseconds of the commands by which the Go flanneld checks one family's rules (firewall spec 1.8).
fn upstream(program: &'static str) {
    let checks = move || {
        host();
        let mode = if program == "iptables-nft" { Mode::IptablesNft } else { Mode::IptablesLegacy };
        let mut life = Life::begin(options(mode));
        life.set([share(0), None]);
        life.settle();
        let mut commands = Vec::new();
        for (table, chain) in [("nat", "FLANNEL-POSTRTG"), ("filter", "FLANNEL-FWD")] {
            for line in run(&format!("{program} -t {table} -S")).lines() {
                if let Some(rule) = line.strip_prefix("-A ") {
                    commands.push(format!("{program} -t {table} -S {chain} 1"));
                    commands.push(format!("{program} -t {table} -C {rule}"));
                }
            }
        }
        let begin = Instant::now();
        commands.iter().for_each(|command| drop(run(command)));
        (begin.elapsed(), commands.len())
    };
    let rounds = (0..ROUNDS).map(|_| thread::spawn(checks).join().unwrap());
    let (times, counts): (Vec<Duration>, Vec<usize>) = rounds.unzip();
    println!("{program:<16} {} programs run, {:>8.1} ms", counts[0], median(times));
}

fn main() {
    println!("milliseconds, medians of {ROUNDS}     first start   next start   repair");
    for mode in [Mode::IptablesNft, Mode::Nftables, Mode::IptablesLegacy] {
        for (crowded, beside) in [(false, "alone"), (true, "10,000 others")] {
            let [first, next, repair] = figures(mode, crowded);
            println!("{:<16} {beside:<14} {first:>12.1} {next:>12.1} {repair:>8.1}", mode.name());
        }
    }
    println!("\nthe Go flanneld's check of one family, every five seconds");
    for program in ["iptables-nft", "iptables-legacy"] {
        upstream(program);
    }
}
