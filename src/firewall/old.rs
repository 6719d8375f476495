//! What versions before 0.20 have left: rules in everybody's chains, and a chain called `FLANNEL` (firewall spec 1.12).

use ipnet::IpNet;

use super::change::{Change, Ours, delete};
use super::plan::multicast;
use super::rule::{Rule, Term, Verdict};
use super::seen::{Found, Seen};
use super::site::{OLD_CHAIN, Part, Site};

/// The steps that remove them from one place.
pub(super) fn remove(site: Site, ours: &Ours, seen: &Seen, push: &mut impl FnMut(Change)) {
    let Some(hook) = site.hook() else { return };
    let found = seen.chain(site.family, site.table(), hook).unwrap_or_default();
    let known = || found.iter().filter_map(|found| Some((found.handle, found.rule.as_ref()?)));
    // without a remark a rule can be the operator's; these are only ever flannel's, and tell what else is
    let signed: Vec<IpNet> = known()
        .filter(|(_, rule)| rule.comment.is_empty())
        .filter_map(|(_, rule)| signature(rule, site))
        .filter(|network| ours.networks.contains(network))
        .collect();
    let is_old = |rule: &Rule| match &*rule.comment {
        "flanneld masq" | "flannel masq" | "flanneld forward" => {
            !matches!(rule.verdict, Verdict::Jump(_)) && is_about_ours(rule, site, ours)
        }
        "" => signed.iter().any(|network| is_unsigned(rule, *network, site)),
        _ => false,
    };
    let old = known().filter(|(_, rule)| is_old(rule));
    delete(hook, old.map(|(handle, _)| handle), push);
    let Some(chain) = seen.chain(site.family, site.table(), OLD_CHAIN) else { return };
    let jumps = found.iter().filter(|found| found.jump.as_deref() == Some(OLD_CHAIN));
    let unused = jumps.into_iter().all(|found| found.rule.as_ref().is_some_and(is_old));
    let stuck = ours.stuck.contains(&(site.family, site.table(), OLD_CHAIN));
    if site.part == Part::Masquerade && unused && !stuck && is_old_chain(chain, ours) {
        push(Change::RemoveChain(OLD_CHAIN));
    }
}

/// Accepts what goes to a network of ours, and masquerades the rest.
fn is_old_chain(chain: &[Found], ours: &Ours) -> bool {
    let mut rules = chain.iter().map(|found| found.rule.as_ref());
    let to_ours = |rule: &Rule| {
        rule.verdict == Verdict::Accept
            && rule.source.is_none()
            && rule.destination.is_some_and(|to| !to.not && ours.networks.contains(&to.net))
    };
    let known = |rule: &Rule| matches!(rule.verdict, Verdict::Accept | Verdict::Masquerade { .. });
    rules.clone().flatten().any(to_ours) && rules.all(|rule| rule.is_some_and(known))
}

/// Does the rule name addresses, and none but those of networks of ours?
fn is_about_ours(rule: &Rule, site: Site, ours: &Ours) -> bool {
    let terms = || [rule.source, rule.destination].into_iter().flatten().map(|term| term.net);
    let mut nets = terms().filter(|net| *net != multicast(site.family)).peekable();
    nets.peek().is_some() && nets.all(|net| ours.concerns(&net))
}

/// The network of a rule that masquerades all that leaves it but multicast, or that leads to the chain of old.
fn signature(rule: &Rule, site: Site) -> Option<IpNet> {
    let from = rule.source.filter(|from| !from.not)?;
    let everywhere = rule.destination == Term::is_not(multicast(site.family));
    let signs = match &rule.verdict {
        Verdict::Masquerade { .. } => everywhere,
        Verdict::Jump(chain) => chain == OLD_CHAIN && rule.destination.is_none(),
        _ => false,
    };
    (signs && rule.mark.is_none()).then_some(from.net)
}

/// Is it one of the forms that were written beside a [`signature`] about the same network (firewall spec 1.12)?
fn is_unsigned(rule: &Rule, network: IpNet, site: Site) -> bool {
    let (source, destination) = (rule.source, rule.destination);
    let (inside, outside) = (Term::is(network), Term::is_not(network));
    let form = match &rule.verdict {
        Verdict::Return => {
            let to_a_subnet = destination.is_some_and(|to| !to.not && network.contains(&to.net));
            source == inside && destination == inside || source == outside && to_a_subnet
        }
        Verdict::Masquerade { .. } => source == outside && destination == inside,
        _ => false,
    };
    rule.mark.is_none() && (form || signature(rule, site) == Some(network))
}
