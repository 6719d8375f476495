//! Every backend on every store in every address family: all containers reach each other with packets of the full MTU.

use std::thread;
use std::time::Duration;

use super::world::{Host, PATIENCE, World, until};

const V4: &str = r#""Network":"10.5.0.0/16""#;
const V6: &str = r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48""#;
const DUAL: &str = r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48""#;

fn all_pairs(api: &str, families: &str, backend: &str) -> (World, Vec<Host>) {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(api, &format!(r#"{{{families},"Backend":{backend}}}"#));
    let hosts = world.hosts(3);
    let agents: Vec<_> = hosts.iter().map(|host| host.start(&["-etcd-api=auto"])).collect();
    agents.iter().for_each(super::world::Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    for from in &hosts {
        for to in hosts.iter().filter(|to| to.number != from.number) {
            for ip in [to.container_ip(), to.container_ip6()].into_iter().flatten() {
                let mut last = String::new();
                until(&format!("{} pings {ip}", from.name), PATIENCE, || match from.ping(&ip) {
                    Ok(_) => true,
                    Err(error) => {
                        last = error;
                        thread::sleep(Duration::from_millis(50));
                        false
                    }
                });
            }
        }
    }
    transfer(&hosts[0], &hosts[1]);
    for agent in agents {
        assert!(!agent.log().contains("] E"), "{}", agent.log());
        assert_eq!(agent.stop().code(), Some(0));
    }
    (world, hosts)
}

/// Some megabytes by TCP, in each family.
fn transfer(from: &Host, to: &Host) {
    for ip in [to.container_ip(), to.container_ip6()].into_iter().flatten() {
        let mut server = to.container_command("iperf3");
        let _server = super::world::Process::start(
            "iperf3",
            server.args(["-s", "-1"]).stdout(std::process::Stdio::null()),
        );
        let client = format!("iperf3 -c {ip} -n 4M --connect-timeout 1000");
        until("the transfer", PATIENCE, || from.try_in_container(&client).is_ok());
    }
}

#[test]
fn vxlan_v4_etcd_v3() {
    all_pairs("v3", V4, r#"{"Type":"vxlan"}"#);
}

#[test]
fn vxlan_v4_etcd_v2() {
    all_pairs("v2", V4, r#"{"Type":"vxlan","Port":4789,"VNI":77}"#);
}

#[test]
fn vxlan_v6_etcd_v3() {
    all_pairs("v3", V6, r#"{"Type":"vxlan"}"#);
}

#[test]
fn vxlan_v6_etcd_v2() {
    all_pairs("v2", V6, r#"{"Type":"vxlan"}"#);
}

#[test]
fn vxlan_dual_etcd_v3() {
    all_pairs("v3", DUAL, r#"{"Type":"vxlan","GBP":true}"#);
}

#[test]
fn vxlan_dual_etcd_v2() {
    all_pairs("v2", DUAL, r#"{"Type":"vxlan","MTU":1400}"#);
}

#[test]
fn vxlan_with_direct_routing() {
    let (_world, hosts) = all_pairs("v3", DUAL, r#"{"Type":"vxlan","DirectRouting":true}"#);
    let routes = hosts[0].routes();
    assert!(
        routes.contains("via 192.168.77.12 dev eth0") && routes.contains("via fd77::12 dev eth0"),
        "{routes}"
    );
    assert!(!routes.contains("flannel"), "{routes}");
}

#[test]
fn host_gw_v4_etcd_v3() {
    all_pairs("v3", V4, r#"{"Type":"host-gw"}"#);
}

#[test]
fn host_gw_v4_etcd_v2() {
    all_pairs("v2", V4, r#"{"Type":"host-gw"}"#);
}

#[test]
fn host_gw_v6_etcd_v3() {
    all_pairs("v3", V6, r#"{"Type":"host-gw"}"#);
}

#[test]
fn host_gw_dual_etcd_v2() {
    all_pairs("v2", DUAL, r#"{"Type":"host-gw"}"#);
}

#[test]
fn host_gw_dual_etcd_v3() {
    all_pairs("v3", DUAL, r#"{"Type":"host-gw"}"#);
}

#[test]
fn udp_v4_etcd_v3() {
    all_pairs("v3", V4, r#"{"Type":"udp"}"#);
}

#[test]
fn udp_v4_etcd_v2() {
    all_pairs("v2", V4, r#"{"Type":"udp","Port":7777}"#);
}

#[test]
fn alloc_gives_a_subnet_and_touches_nothing() {
    for api in ["v2", "v3"] {
        let mut world = World::new();
        let etcd = world.etcd(&[]);
        etcd.put_config(api, r#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#);
        let hosts = world.hosts(2);
        let agents: Vec<_> = hosts.iter().map(|host| host.start(&[])).collect();
        agents.iter().for_each(super::world::Agent::wait_ready);
        assert_ne!(hosts[0].env("FLANNEL_SUBNET"), hosts[1].env("FLANNEL_SUBNET"));
        assert_eq!(
            (hosts[0].env("FLANNEL_MTU"), hosts[0].routes()),
            (Some("1500".into()), String::new())
        );
        drop(etcd);
    }
}

#[test]
fn udp_dual_stack() {
    all_pairs("v3", DUAL, r#"{"Type":"udp"}"#);
}

#[test]
fn udp_v6_alone() {
    all_pairs("v3", V6, r#"{"Type":"udp"}"#);
}

#[test]
fn udp_dual_stack_without_offloads() {
    let off = r#"{"TSO":false,"USO":false,"Merge":false,"GSO":false,"GRO":false,"Batch":false}"#;
    all_pairs("v3", DUAL, &format!(r#"{{"Type":"udp","Offloads":{off}}}"#));
}
