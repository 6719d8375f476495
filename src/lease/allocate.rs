//! Chooses a free subnet: at random among the first hundred, as every flanneld does, so that hosts that start together
//! rarely want the same one (control-plane spec 4.7, 5.6).

use super::Subnets;
use crate::config::{FamilyConfig, NetworkConfig};

/// So many free subnets are looked at in each family.
const CANDIDATES: usize = 100;

/// Is `subnets` one that this config would give: every enabled family, no other, in range and of the right length?
pub fn fits(config: &NetworkConfig, subnets: &Subnets) -> bool {
    let v4 = match (&config.v4, subnets.v4) {
        (None, None) => true,
        (Some(config), Some(net)) => {
            net.prefix_len() == config.subnet_len
                && (config.subnet_min..=config.subnet_max).contains(&net.network())
        }
        _ => false,
    };
    let v6 = match (&config.v6, subnets.v6) {
        (None, None) => true,
        (Some(config), Some(net)) => {
            net.prefix_len() == config.subnet_len
                && (config.subnet_min..=config.subnet_max).contains(&net.network())
        }
        _ => false,
    };
    v4 && v6
}

/// Chooses subnets that overlap none of `taken`. `random` decides which.
///
/// # Errors
/// Every subnet of a family is taken.
pub fn choose(
    config: &NetworkConfig,
    taken: &[Subnets],
    random: [u64; 2],
) -> Result<Subnets, String> {
    let v4 = match &config.v4 {
        Some(FamilyConfig { network, subnet_len, subnet_min, subnet_max }) => {
            let used = taken.iter().filter_map(|subnets| subnets.v4);
            let used = used
                .map(|net| (u32::from(net.network()).into(), u32::from(net.broadcast()).into()));
            let range = (u32::from(*subnet_min).into(), u32::from(*subnet_max).into());
            let base = pick(range, 1 << (32 - subnet_len), used.collect(), random[0])
                .ok_or_else(|| full("IPv4", &network.to_string(), *subnet_len))?;
            let base =
                u32::try_from(base).map_err(|_| full("IPv4", &network.to_string(), *subnet_len))?;
            ipnet::Ipv4Net::new(base.into(), *subnet_len).ok()
        }
        None => None,
    };
    let v6 = match &config.v6 {
        Some(FamilyConfig { network, subnet_len, subnet_min, subnet_max }) => {
            let used = taken.iter().filter_map(|subnets| subnets.v6);
            let used = used.map(|net| (u128::from(net.network()), u128::from(net.broadcast())));
            let range = (u128::from(*subnet_min), u128::from(*subnet_max));
            let step = 1u128.checked_shl(128 - u32::from(*subnet_len)).unwrap_or(u128::MAX);
            let base = pick(range, step, used.collect(), random[1])
                .ok_or_else(|| full("IPv6", &network.to_string(), *subnet_len))?;
            ipnet::Ipv6Net::new(base.into(), *subnet_len).ok()
        }
        None => None,
    };
    Ok(Subnets { v4, v6 })
}

fn full(family: &str, network: &str, len: u8) -> String {
    format!(
        "every {family} subnet of length {len} in {network} is taken: remove stale leases, or make the network larger"
    )
}

/// A free base address in `first..=last`, both multiples of `step` apart. `used` are inclusive ranges in any order.
fn pick(
    (first, last): (u128, u128),
    step: u128,
    mut used: Vec<(u128, u128)>,
    random: u64,
) -> Option<u128> {
    used.sort_unstable();
    let mut used = used.into_iter().peekable();
    let mut free = Vec::new();
    let mut at = first;
    while at <= last && free.len() < CANDIDATES {
        while used.next_if(|(_, end)| *end < at).is_some() {}
        match used.peek() {
            Some((start, end)) if *start <= at.saturating_add(step - 1) => {
                // on to the first step behind it
                let steps = (*end - at) / step + 1;
                let Some(next) = step.checked_mul(steps).and_then(|skip| at.checked_add(skip))
                else {
                    break;
                };
                at = next;
            }
            _ => {
                free.push(at);
                let Some(next) = at.checked_add(step) else { break };
                at = next;
            }
        }
    }
    let count = u64::try_from(free.len()).ok().filter(|count| *count > 0)?;
    free.get(usize::try_from(random % count).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    fn subnets(v4: &str, v6: &str) -> Subnets {
        Subnets { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    #[test]
    fn only_free_ones_and_never_one_twice() {
        let config =
            config(r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0"}"#);
        let mut taken = vec![subnets("10.3.6.128/25", ""), subnets("192.0.2.0/24", "")];
        let mut chosen = Vec::new();
        for random in [5, 9, 2] {
            let next = choose(&config, &taken, [random, 0]).unwrap();
            assert!(fits(&config, &next), "{next}");
            taken.push(next);
            chosen.push(next.to_string());
        }
        chosen.sort();
        assert_eq!(chosen, ["10.3.5.0/24", "10.3.7.0/24", "10.3.8.0/24"]);
        assert!(choose(&config, &taken, [0, 0]).unwrap_err().contains("10.3.0.0/16"));
    }

    #[test]
    fn a_huge_lease_and_the_end_of_the_address_space_are_no_trap() {
        let config = config(
            r#"{"Network":"128.0.0.0/1","SubnetLen":24,"SubnetMin":"255.255.254.0","SubnetMax":"255.255.255.0"}"#,
        );
        assert_eq!(choose(&config, &[], [1, 0]).unwrap(), subnets("255.255.255.0/24", ""));
        assert!(choose(&config, &[subnets("128.0.0.0/1", "")], [1, 0]).is_err());
        let all = Subnets { v4: "0.0.0.0/0".parse().ok(), v6: None };
        assert!(choose(&config, &[all], [1, 0]).is_err());
    }

    #[test]
    fn random_among_the_first_hundred() {
        let config = config(r#"{"Network":"10.3.0.0/16"}"#);
        let chosen: std::collections::BTreeSet<_> =
            (0..1000).map(|random| choose(&config, &[], [random, 0]).unwrap()).collect();
        assert_eq!(chosen.len(), 100);
        assert_eq!(chosen.last(), Some(&subnets("10.3.100.0/24", "")));
    }

    #[test]
    fn both_families_at_once() {
        let config =
            config(r#"{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fd00:3::/48"}"#);
        let taken = [subnets("10.3.1.0/24", "fd00:3:0:1::/64")];
        let next = choose(&config, &taken, [0, 0]).unwrap();
        assert_eq!(next, subnets("10.3.2.0/24", "fd00:3:0:2::/64"));
        assert!(fits(&config, &next));
        for (v4, v6) in [
            ("10.3.2.0/24", ""),
            ("", "fd00:3:0:2::/64"),
            ("10.3.2.0/25", "fd00:3:0:2::/64"),
            ("10.4.2.0/24", "fd00:3:0:2::/64"),
            ("10.3.2.0/24", "fd00:4:0:2::/64"),
            ("10.3.0.0/24", "fd00:3:0:2::/64"),
        ] {
            assert!(!fits(&config, &subnets(v4, v6)), "{v4} {v6}");
        }
    }
}
