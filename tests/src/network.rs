//! Network namespaces on a bridge of their own, one a worker, whose links can be cut. Needs root and `ip`.

use std::process::Command;

/// A bridge with the host on it, and namespaces behind it. Dropping it takes all of it away.
pub struct Network {
    number: u32,
    namespaces: usize,
}

impl Network {
    /// `None`, said aloud, where this user may not make one.
    pub fn new(namespaces: usize) -> Option<Self> {
        let network = Self {
            number: std::process::id() % 250,
            namespaces,
        };
        let made = network.make();
        if made.is_none() {
            eprintln!("skipped: network namespaces need root and the program ip");
        }
        made.map(|()| network)
    }

    fn make(&self) -> Option<()> {
        let (bridge, host) = (self.bridge(), format!("{}/24", self.host()));
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &host, "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for index in 0..self.namespaces {
            let (name, link) = (self.namespace(index), self.link(index));
            let address = format!("{}/24", self.address(index));
            ip(&["netns", "add", &name])?;
            let peer = ["type", "veth", "peer", "name", "eth0", "netns", &name];
            ip(&[&["link", "add", &link], &peer[..]].concat())?;
            ip(&["link", "set", &link, "master", &bridge, "up"])?;
            let inside = ["netns", "exec", &name, "ip"];
            ip(&[&inside[..], &["addr", "add", &address, "dev", "eth0"]].concat())?;
            ip(&[&inside[..], &["link", "set", "eth0", "up"]].concat())?;
            ip(&[&inside[..], &["link", "set", "lo", "up"]].concat())?;
        }
        Some(())
    }

    /// The host's address on the bridge.
    pub fn host(&self) -> String {
        format!("10.78.{}.1", self.number)
    }

    /// The address in a namespace.
    pub fn address(&self, index: usize) -> String {
        format!("10.78.{}.{}", self.number, index + 10)
    }

    /// A command that runs `program` in a namespace.
    pub fn inside(&self, index: usize, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(index)]);
        command.arg(program);
        command
    }

    /// Cuts a namespace off from all others.
    ///
    /// # Panics
    /// If the link cannot be set.
    pub fn cut(&self, index: usize) {
        ip(&["link", "set", &self.link(index), "down"]).expect("a link");
    }

    /// Ends the cut.
    ///
    /// # Panics
    /// If the link cannot be set.
    pub fn heal(&self, index: usize) {
        ip(&["link", "set", &self.link(index), "up"]).expect("a link");
    }

    fn bridge(&self) -> String {
        format!("cdb{}", self.number)
    }

    fn namespace(&self, index: usize) -> String {
        format!("cdn{}-{index}", self.number)
    }

    fn link(&self, index: usize) -> String {
        format!("cdv{}-{index}", self.number)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for index in 0..self.namespaces {
            ip(&["netns", "del", &self.namespace(index)]);
        }
        ip(&["link", "del", &self.bridge()]);
    }
}

fn ip(arguments: &[&str]) -> Option<()> {
    let done = Command::new("ip").args(arguments).output().ok()?;
    done.status.success().then_some(())
}
