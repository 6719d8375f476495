//! Which subnets this host should have: those that it has, those that it had, or free ones (control-plane spec 4.6, 5.5).

use super::{Subnets, allocate};
use crate::config::NetworkConfig;

/// What to do in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Take over our own lease: number so-and-so of `mine`.
    Reuse(usize),
    /// Our own lease is not one that the network config would give now: delete it and plan again.
    Delete(usize),
    /// Create a lease.
    Create(Subnets),
}

/// Plans. `mine` are the leases that carry our public address, in the order of the store; `taken` are all that anybody
/// claims; `previous` are the subnets of our last life.
///
/// # Errors
/// There is no free subnet.
pub fn plan(
    config: &NetworkConfig,
    mine: &[Subnets],
    previous: &Subnets,
    taken: &[Subnets],
    random: [u64; 2],
) -> Result<Plan, String> {
    let fits = |subnets: &Subnets| allocate::fits(config, subnets);
    // two leases of ours: the one that our containers already use
    let number = mine.iter().position(|subnets| subnets == previous && fits(subnets));
    if let Some(number) = number.or_else(|| mine.iter().position(fits)) {
        return Ok(Plan::Reuse(number));
    }
    if !mine.is_empty() {
        return Ok(Plan::Delete(0));
    }
    if fits(previous) && !taken.iter().any(|other| overlap(other, previous)) {
        return Ok(Plan::Create(*previous));
    }
    allocate::choose(config, taken, random).map(Plan::Create)
}

/// Do two leases claim an address in common?
pub fn overlap(a: &Subnets, b: &Subnets) -> bool {
    let v4 = a.v4.zip(b.v4).is_some_and(|(a, b)| a.contains(&b) || b.contains(&a));
    v4 || a.v6.zip(b.v6).is_some_and(|(a, b)| a.contains(&b) || b.contains(&a))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnets(v4: &str) -> Subnets {
        Subnets { v4: v4.parse().ok(), v6: None }
    }

    #[test]
    fn what_we_have_then_what_we_had_then_anything() {
        let config = NetworkConfig::parse(r#"{"Network":"10.3.0.0/16"}"#).unwrap();
        let (five, six, foreign) =
            (subnets("10.3.5.0/24"), subnets("10.3.6.0/24"), subnets("10.4.6.0/24"));
        let planned = |mine: &[Subnets], previous: Subnets, taken: &[Subnets]| {
            plan(&config, mine, &previous, taken, [0, 0]).unwrap()
        };
        let none = Subnets::default();
        assert_eq!(planned(&[five, six], none, &[five, six]), Plan::Reuse(0));
        assert_eq!(planned(&[five, six], six, &[five, six]), Plan::Reuse(1));
        assert_eq!(planned(&[foreign, six], foreign, &[foreign, six]), Plan::Reuse(1));
        assert_eq!(planned(&[foreign], five, &[foreign]), Plan::Delete(0));
        assert_eq!(planned(&[], five, &[six]), Plan::Create(five));
        assert_eq!(
            planned(&[], five, &[subnets("10.3.5.128/25")]),
            Plan::Create(subnets("10.3.1.0/24"))
        );
        assert_eq!(planned(&[], foreign, &[]), Plan::Create(subnets("10.3.1.0/24")));
    }
}
