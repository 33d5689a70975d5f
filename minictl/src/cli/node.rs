//! `node list`, `cordon` and `uncordon`.

use minipod_proto::Resource;
use minipod_proto::v1::Node;

use super::args::{GetArgs, NodeCommand, SelectArgs, TargetArgs};
use super::error::CliError;
use super::session::Session;
use super::{get, print};
use crate::view::text;

/// `minictl node …`
pub async fn run(session: &Session, command: &NodeCommand) -> Result<(), CliError> {
    match command {
        NodeCommand::List { output } => {
            let target = TargetArgs { targets: vec!["nodes".to_owned()], select: SelectArgs::default() };
            let options = GetArgs { target, output: *output, watch: false, no_headers: false, show_labels: false };
            get::run(session, &options).await
        }
        NodeCommand::Cordon { nodes } => cordon(session, nodes, true).await,
        NodeCommand::Uncordon { nodes } => cordon(session, nodes, false).await,
    }
}

/// Sets whether pods may be put on nodes.
pub async fn cordon(session: &Session, nodes: &[String], cordoned: bool) -> Result<(), CliError> {
    for name in nodes {
        let name = name.strip_prefix("node/").unwrap_or(name);
        let node: Node = session.client.get("", name).await?;
        let word = if cordoned { "cordoned" } else { "uncordoned" };
        if node.spec().unschedulable == cordoned {
            print(&format!("node/{} already {word}\n", text::line(node.name())))?;
            continue;
        }
        session.client.patch::<Node>("", name, &format!(r#"{{"spec":{{"unschedulable":{cordoned}}}}}"#)).await?;
        print(&format!("node/{} {word}\n", text::line(node.name())))?;
    }
    Ok(())
}
