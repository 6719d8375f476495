//! The text that `iptables-save` writes and `iptables-restore` reads.

use std::borrow::Cow;
use std::fmt::Write;

use ipnet::IpNet;

use crate::family::Family;
use crate::firewall::change::Change;
use crate::firewall::rule::{Mark, Rule, Term, Verdict};
use crate::firewall::seen::{Found, Seen};
use crate::firewall::site::{OLD_CHAIN, Site, Style};

/// What a saved rule set shows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Saved {
    pub(super) seen: Seen,
    /// A chain of kubelet's that says that this is the variant it uses (firewall spec 1.15).
    pub(super) hint: bool,
    /// Rules of others in `nat` and `filter`.
    pub(super) foreign: usize,
    /// The arguments of the rules in [`Saved::seen`], by handle.
    lines: Vec<String>,
}

/// Reads the output of `iptables-save` for one family.
pub(super) fn parse(text: &str, family: Family) -> Saved {
    let mut saved = Saved::default();
    let mut table = "";
    let known = |table: &str, chain: &str| -> Option<(&'static str, &'static str)> {
        Site::all(Style::Iptables).filter(|site| site.table() == table).find_map(|site| {
            let chains = site.hook().into_iter().chain([site.chain(), OLD_CHAIN]);
            chains.into_iter().find(|known| *known == chain).map(|known| (site.table(), known))
        })
    };

    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
            let ours = Site::all(Style::Iptables).map(Site::table).find(|name| *name == table);
            saved.seen.tables.extend(ours.map(|name| (family, name)));
        } else if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split_whitespace();
            let chain = words.next().unwrap_or_default();
            saved.hint |=
                table == "mangle" && matches!(chain, "KUBE-IPTABLES-HINT" | "KUBE-KUBELET-CANARY");
            if let Some((table, chain)) = known(table, chain) {
                saved.seen.chains.insert((family, table, chain), Vec::new());
            }
            // a policy that drops is as good as a rule
            saved.foreign +=
                usize::from((table, chain, words.next()) == ("filter", "FORWARD", Some("DROP")));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let (chain, arguments) = rule.split_once(' ').unwrap_or((rule, ""));
            let Some((table, chain)) = known(table, chain) else {
                saved.foreign += usize::from(matches!(table, "nat" | "filter"));
                continue;
            };
            saved.lines.push(arguments.to_owned());
            let handle = u64::try_from(saved.lines.len()).unwrap_or(u64::MAX);
            let words = words(arguments);
            let rule = rule_of(&words, family);
            let jump = words.iter().rposition(|word| word == "-j");
            let jump = jump.and_then(|at| words.get(at + 1)).map(|chain| chain.as_str().into());
            let everybodys = matches!(chain, "POSTROUTING" | "FORWARD");
            saved.foreign += usize::from(everybodys && !line.contains("flannel"));
            let found = Found { handle, rule, jump };
            saved.seen.chains.entry((family, table, chain)).or_default().push(found);
        }
    }
    saved
}

/// Words as a shell would split them; `iptables-save` quotes with `"` and escapes with `\`.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), None::<String>);
    let (mut quoted, mut escaped) = (false, false);
    for letter in line.chars() {
        match letter {
            _ if escaped => {
                word.get_or_insert_default().push(letter);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// `None` for what a [`Rule`] cannot say.
fn rule_of(words: &[String], family: Family) -> Option<Rule> {
    let mut rule = Rule::new(Verdict::Return);
    let (mut not, mut judged) = (false, false);
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        match word {
            "!" if !not => {
                not = true;
                continue;
            }
            "-s" => rule.source = Some(Term { net: prefix(words.next()?, family)?, not }),
            "-d" => rule.destination = Some(Term { net: prefix(words.next()?, family)?, not }),
            _ if not => return None,
            "-m" => match words.next()? {
                "comment" | "mark" => {}
                _ => return None,
            },
            "--comment" => rule.comment = Cow::Owned(words.next()?.to_owned()),
            "--mark" => rule.mark = Some(mark(words.next()?)?),
            "-j" => {
                judged = true;
                rule.verdict = match words.next()? {
                    "ACCEPT" => Verdict::Accept,
                    "RETURN" => Verdict::Return,
                    "MASQUERADE" => Verdict::Masquerade { fully_random: false },
                    "DROP" | "REJECT" | "SNAT" | "DNAT" | "LOG" => return None,
                    chain => Verdict::Jump(Cow::Owned(chain.to_owned())),
                };
            }
            "--random-fully" => match &mut rule.verdict {
                Verdict::Masquerade { fully_random } => *fully_random = true,
                _ => return None,
            },
            _ => return None,
        }
        not = false;
    }
    judged.then_some(rule)
}

fn prefix(text: &str, family: Family) -> Option<IpNet> {
    let net = text
        .parse::<IpNet>()
        .ok()
        .or_else(|| Some(text.parse::<std::net::IpAddr>().ok()?.into()))?;
    (Family::of_net(&net) == family && net == net.trunc()).then_some(net)
}

fn mark(text: &str) -> Option<Mark> {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    match text.split_once('/') {
        Some((value, mask)) => Some(Mark { value: number(value)?, mask: number(mask)? }),
        None => Some(Mark { value: number(text)?, mask: u32::MAX }),
    }
}

/// The steps as the input of `iptables-restore --noflush`: all of a table at once or nothing of it. Rules are deleted by what
/// they say: their numbers may have changed since they were read.
pub(super) fn render(steps: &[(Site, Change)], saved: &Saved) -> String {
    let mut text = String::new();
    for table in ["nat", "filter"] {
        let mut steps = steps.iter().filter(|(site, _)| site.table() == table).peekable();
        if steps.peek().is_none() {
            continue;
        }
        let _ = writeln!(text, "*{table}");
        for (site, change) in steps {
            let _ = match change {
                // the kernel has the tables and their base chains
                Change::MakeTable | Change::MakeHook | Change::RemoveTable => Ok(()),
                // declares it, and empties it
                Change::MakeChain | Change::RemakeChain => {
                    writeln!(text, ":{} - [0:0]", site.chain())
                }
                Change::Delete { chain, handle } => {
                    let line = usize::try_from(handle - 1).ok().and_then(|at| saved.lines.get(at));
                    writeln!(text, "-D {chain} {}", line.map_or("", String::as_str))
                }
                Change::Flush(chain) => writeln!(text, "-F {chain}"),
                Change::Insert(rule) => writeln!(text, "-I {} 1 {rule}", site.chain()),
                Change::Append { chain, rule } => writeln!(text, "-A {chain} {rule}"),
                Change::RemoveChain(chain) => writeln!(text, "-F {chain}\n-X {chain}"),
            };
        }
        text.push_str("COMMIT\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::plan::{self, Share};
    use crate::firewall::site::Part;

    const SITE: Site = Site { family: Family::V4, style: Style::Iptables, part: Part::Masquerade };

    #[test]
    fn what_is_written_is_read() {
        for (family, network, subnet) in [
            (Family::V4, "10.244.0.0/16", "10.244.1.0/24"),
            (Family::V6, "2001:cafe:42::/56", "2001:cafe:42:1::/64"),
        ] {
            for part in Part::ALL {
                let site = Site { family, part, ..SITE };
                let share =
                    Share { network: network.parse().unwrap(), subnet: subnet.parse().unwrap() };
                for rule in plan::rules(site, share, true).into_iter().chain(plan::hook_rule(site))
                {
                    assert_eq!(rule_of(&words(&rule.to_string()), family), Some(rule));
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_said_is_no_rule() {
        for line in [
            "-s 10.0.0.0/8 -o eth0 -j MASQUERADE",
            "-p tcp -m tcp --dport 80 -j ACCEPT",
            "-m mark ! --mark 0x1/0x1 -j RETURN",
            "-s 10.0.0.0/8",
            "-j SNAT --to-source 1.2.3.4",
            "-s fd00::/8 -j RETURN",
            "-s 10.0.0.1/8 -j RETURN",
            "-g FLANNEL-POSTRTG",
            "",
        ] {
            assert_eq!(rule_of(&words(line), Family::V4), None, "{line}");
        }
    }

    #[test]
    fn a_saved_rule_set() {
        let saved = parse(
            "# Generated by iptables-save\n*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n*nat\n\
             :POSTROUTING ACCEPT [5:300]\n:FLANNEL-POSTRTG - [0:0]\n:DOCKER - [0:0]\n\
             -A DOCKER -i docker0 -j RETURN\n-A POSTROUTING -o eth0 -j MASQUERADE\n\
             -A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
             -A FLANNEL-POSTRTG -s 10.1.0.1 -m comment --comment \"a \\\"b\\\" c\" -j RETURN\nCOMMIT\n",
            Family::V4,
        );
        assert!(saved.hint && saved.foreign == 2);
        let hook = saved.seen.chain(Family::V4, "nat", "POSTROUTING").unwrap();
        assert_eq!(hook[0].rule, None);
        assert_eq!(hook[1].jump.as_deref(), Some("FLANNEL-POSTRTG"));
        let steps = [(SITE, Change::Delete { chain: "POSTROUTING", handle: hook[0].handle })];
        assert_eq!(render(&steps, &saved), "*nat\n-D POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n");
        assert_eq!(hook[1].rule, plan::hook_rule(SITE));
        let own = saved.seen.chain(Family::V4, "nat", "FLANNEL-POSTRTG").unwrap();
        let rule = own[0].rule.as_ref().unwrap();
        assert_eq!(rule.comment, "a \"b\" c");
        assert_eq!(rule.source.unwrap().net.to_string(), "10.1.0.1/32");
        assert!(saved.seen.chain(Family::V4, "filter", "FORWARD").is_none());
    }

    #[test]
    fn mutated_text_never_panics() {
        let text = "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING ! -s 10.1.0.0/16 -m mark --mark 0x4000/0x4000 \
                    -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\nCOMMIT\n";
        let mut state = 7u32;
        for _ in 0..20_000 {
            let mut bytes = text.as_bytes().to_vec();
            for _ in 0..3 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = usize::try_from(state >> 8).unwrap() % bytes.len();
                bytes[at] = state.to_be_bytes()[0] & 0x7f;
            }
            let _ = parse(&String::from_utf8(bytes).unwrap(), Family::V4);
        }
    }

    #[test]
    fn steps_as_text() {
        let rule = Rule::new(Verdict::Accept);
        let forward = Site { part: Part::Forward, ..SITE };
        let steps = [
            (SITE, Change::MakeChain),
            (SITE, Change::Flush("FLANNEL-POSTRTG")),
            (SITE, Change::Insert(rule.clone())),
            (forward, Change::Append { chain: "FORWARD", rule }),
            (forward, Change::RemoveChain("FLANNEL-FWD")),
        ];
        assert_eq!(
            render(&steps, &Saved::default()),
            "*nat\n:FLANNEL-POSTRTG - [0:0]\n-F FLANNEL-POSTRTG\n-I FLANNEL-POSTRTG 1 -j ACCEPT\nCOMMIT\n\
             *filter\n-A FORWARD -j ACCEPT\n-F FLANNEL-FWD\n-X FLANNEL-FWD\nCOMMIT\n"
        );
        assert_eq!(render(&[], &Saved::default()), "");
    }
}
