//! Where others reach a listener of this machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Addresses for documentation (RFC 5737 and 3849), which no machine has: the way to them is the way to all others.
const FAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const FAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// An address to connect to, for a listener at `bound`: where that is all addresses of this machine (`0.0.0.0`, `::`), the one
/// from which it reaches others, or loopback where it reaches nobody.
pub(crate) fn reachable(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => own_address(FAR_V4).unwrap_or(Ipv4Addr::LOCALHOST.into()),
        // Such a listener takes both kinds.
        IpAddr::V6(_) => own_address(FAR_V6)
            .or_else(|| own_address(FAR_V4))
            .unwrap_or(Ipv6Addr::LOCALHOST.into()),
    };
    SocketAddr::new(ip, bound.port())
}

/// The address from which this machine reaches `far`. Of a datagram socket this only asks for the route; nothing is sent.
fn own_address(far: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match far {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((far, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_told_by_one_that_can_be_connected_to() {
        for bound in ["0.0.0.0:7070", "[::]:7070"] {
            let told = reachable(bound.parse().expect("an address"));
            assert!(!told.ip().is_unspecified(), "{bound} is told as {told}");
            assert_eq!(told.port(), 7070);
        }
        for bound in ["127.0.0.1:7070", "10.1.2.3:80", "[::1]:7070"] {
            let bound: SocketAddr = bound.parse().expect("an address");
            assert_eq!(reachable(bound), bound);
        }
    }
}
