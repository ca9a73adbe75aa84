//! How a text names a command: with the configuration and the node that it is for, so that an operator can type it as it
//! stands, on either node. The one place where a suggested command is put together.

/// The command line of one volume, as its two nodes' daemons suggest it.
#[derive(Clone, Copy, Debug)]
pub struct Commands<'a> {
    /// The configuration file, which is the same on both nodes.
    pub config: &'a str,
    /// The volume.
    pub volume: &'a str,
    /// This node.
    pub node: &'a str,
    /// The other one.
    pub peer: &'a str,
}

impl Commands<'_> {
    /// A command about the volume for this node; `command` is a subcommand and its options, as in `promote --force`.
    #[must_use]
    pub fn here(&self, command: &str) -> String {
        self.on(self.node, command)
    }

    /// The same for the other node.
    #[must_use]
    pub fn there(&self, command: &str) -> String {
        self.on(self.peer, command)
    }

    /// The same for the one of the two that is called `node`.
    #[must_use]
    pub fn on(&self, node: &str, command: &str) -> String {
        let (subcommand, options) = command.split_once(' ').map_or((command, None), |(a, b)| (a, Some(b)));
        let options = options.map(|options| format!(" {options}")).unwrap_or_default();
        format!("`{} {subcommand} {}{options}`", begin(self.config, node), self.volume)
    }
}

/// How the command line begins that means the configuration `config` and `node`.
#[must_use]
pub fn begin(config: &str, node: &str) -> String {
    format!("costandby --config {config} --node {node}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_stands_with_its_configuration_node_volume_and_options() {
        let commands = Commands { config: "/etc/pair.toml", volume: "db", node: "alpha", peer: "beta" };
        assert_eq!(commands.here("promote"), "`costandby --config /etc/pair.toml --node alpha promote db`");
        assert_eq!(
            commands.there("connect --discard-my-data"),
            "`costandby --config /etc/pair.toml --node beta connect db --discard-my-data`"
        );
    }
}
