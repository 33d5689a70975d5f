//! What several pods that were bound at once must have found.

use std::collections::BTreeSet;

use minipod_proto::Resource;
use minipod_proto::v1::Pod;

use super::World;

impl World {
    /// Binds all of these, one after the other in whichever order will do, as one transaction may have bound them.
    ///
    /// # Errors
    /// When there is no such order, or none was found in a long while; what does not get its place in the one that came farthest.
    pub fn bind_in_some_order(&mut self, news: &[(Pod, String)]) -> Result<(), String> {
        let before = self.pods.len();
        let (mut dead, mut farthest) = (BTreeSet::new(), Vec::new());
        let mut path = Vec::new();
        if self.bind_rest(news, &mut path, &mut dead, &mut farthest) {
            return Ok(());
        }
        self.pods.truncate(before);
        let stuck = (0..news.len()).filter(|at| !farthest.contains(at)).map(|at| &news[at]);
        let told: Vec<String> = stuck
            .map(|(pod, place)| {
                let why = self.node(place).map_or(Some("no such node"), |node| {
                    let mut then = self.clone();
                    then.pods
                        .extend(farthest.iter().map(|at: &usize| (news[*at].0.clone(), Some(news[*at].1.clone()))));
                    then.refusal(pod, node)
                });
                format!("{} on {place}: {}", pod.key(), why.unwrap_or("nothing"))
            })
            .collect();
        Err(told.join(", "))
    }

    /// `dead`: sets of pods after which there is no way on.
    fn bind_rest(
        &mut self,
        news: &[(Pod, String)],
        path: &mut Vec<usize>,
        dead: &mut BTreeSet<Vec<usize>>,
        farthest: &mut Vec<usize>,
    ) -> bool {
        if path.len() == news.len() {
            return true;
        }
        let mut set = path.clone();
        set.sort_unstable();
        if dead.len() > 20_000 || dead.contains(&set) {
            return false;
        }
        if path.len() > farthest.len() {
            farthest.clone_from(path);
        }
        for (at, (pod, place)) in news.iter().enumerate() {
            let admitted =
                !path.contains(&at) && self.node(place).is_some_and(|node| self.refusal(pod, node).is_none());
            if admitted {
                self.pods.push((pod.clone(), Some(place.clone())));
                path.push(at);
                if self.bind_rest(news, path, dead, farthest) {
                    return true;
                }
                path.pop();
                self.pods.pop();
            }
        }
        dead.insert(set);
        false
    }
}
