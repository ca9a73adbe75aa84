//! Where the demo's two nodes listen: on loopback, or where RDMA is if the copies are to go by it.

use super::super::LinkArg;
use std::net::{IpAddr, Ipv4Addr};

/// The address both nodes listen on, and their volumes' `link`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) address: IpAddr,
    pub(super) link: &'static str,
}

/// The place on this machine.
///
/// # Errors
/// With [`LinkArg::Rdma`] where there is no RDMA: what is missing, and how to make some.
pub(super) fn find(link: LinkArg) -> Result<Place, String> {
    choose(link, &addresses(), able)
}

fn choose(
    link: LinkArg,
    addresses: &[IpAddr],
    able: impl Fn(IpAddr) -> Result<(), String>,
) -> Result<Place, String> {
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    if link == LinkArg::Tcp {
        return Ok(Place { address: loopback, link: "tcp" });
    }
    let word = if link == LinkArg::Rdma { "rdma" } else { "auto" };
    let first = able(loopback);
    let Err(why) = first else { return Ok(Place { address: loopback, link: word }) };
    if let Some(&address) = addresses.iter().find(|address| able(**address).is_ok()) {
        return Ok(Place { address, link: word });
    }
    match link {
        LinkArg::Rdma => {
            Err(format!("--link rdma: {why}; `costandby soft-roce up lo` makes all the demo needs"))
        }
        _ => Ok(Place { address: loopback, link: word }),
    }
}

/// Addresses of this machine that an RDMA device has, those that stay on it first.
#[cfg(feature = "rdma")]
fn addresses() -> Vec<IpAddr> {
    let Ok(devices) = costandby_ffi::verbs::devices() else { return Vec::new() };
    let gids = devices.iter().flat_map(|device| &device.ports).flat_map(|port| &port.gids);
    // Link-local addresses would need a scope, and InfiniBand's own are none of IP.
    let mut found: Vec<_> = gids.map(|gid| gid.address.to_canonical()).filter(IpAddr::is_ipv4).collect();
    found.sort_by_key(|address| !address.is_loopback());
    found
}

#[cfg(not(feature = "rdma"))]
fn addresses() -> Vec<IpAddr> {
    Vec::new()
}

#[cfg(feature = "rdma")]
fn able(address: IpAddr) -> Result<(), String> {
    costandby_datapath::transport::rdma::setup::able(address).map_err(|error| error.to_string())
}

#[cfg(not(feature = "rdma"))]
fn able(_: IpAddr) -> Result<(), String> {
    Err("this program was built without the feature `rdma`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_goes_where_the_link_is() {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let card = IpAddr::from([10, 9, 0, 1]);
        let place = |address, link| Ok(Place { address, link });
        let at =
            |link, addresses: &[IpAddr], good: &[IpAddr]| {
                choose(link, addresses, |address| {
                    if good.contains(&address) { Ok(()) } else { Err("no device".into()) }
                })
            };
        assert_eq!(at(LinkArg::Tcp, &[card], &[card]), place(loopback, "tcp"));
        assert_eq!(at(LinkArg::Rdma, &[card], &[card, loopback]), place(loopback, "rdma"));
        assert_eq!(at(LinkArg::Rdma, &[card], &[card]), place(card, "rdma"));
        assert_eq!(at(LinkArg::Auto, &[card], &[card]), place(card, "auto"));
        assert_eq!(at(LinkArg::Auto, &[], &[]), place(loopback, "auto"));
        let error = at(LinkArg::Rdma, &[card], &[]).expect_err("none");
        assert!(error.contains("no device") && error.contains("soft-roce up lo"), "{error}");
    }
}
