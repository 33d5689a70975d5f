//! How many pods each disruption budget has, kept as pods change: an eviction under a budget looks at a number, not at all pods of its
//! namespace, and so does whoever keeps the budget's status true. Pure.

use std::collections::{BTreeMap, HashMap};

use minipod_proto::{
    disruption::{Counted, Scope},
    v1::{Pod, PodDisruptionBudget},
};

/// The budgets that there are, by namespace and key.
#[derive(Debug, Default)]
pub struct Counts {
    budgets: HashMap<String, BTreeMap<String, Count>>,
}

#[derive(Debug)]
struct Count {
    scope: Scope,
    pods: Counted,
}

impl Counts {
    /// The pods of a budget; `None`: there is no such budget, or its selector is none, which validation refuses.
    pub fn of(&self, namespace: &str, key: &str) -> Option<Counted> {
        Some(self.budgets.get(namespace)?.get(key)?.pods)
    }

    /// A pod came, changed or went.
    pub fn pod(&mut self, namespace: &str, before: Option<&Pod>, after: Option<&Pod>) {
        for count in self.budgets.get_mut(namespace).into_iter().flat_map(BTreeMap::values_mut) {
            let one = |pod: Option<&Pod>| pod.filter(|pod| count.scope.has(pod)).map(Counted::one).unwrap_or_default();
            count.pods = count.pods.minus(&one(before)).plus(&one(after));
        }
    }

    /// A budget came, or its spec changed; `pods` are those of its namespace.
    pub fn budget<'a>(&mut self, key: &str, budget: &PodDisruptionBudget, pods: impl Iterator<Item = &'a Pod>) {
        let Ok(scope) = Scope::of(budget) else { return self.forget(minipod_proto::Resource::namespace(budget), key) };
        let pods = Counted::of(pods.filter(|pod| scope.has(pod)));
        let namespace = scope.namespace().to_owned();
        self.budgets.entry(namespace).or_default().insert(key.to_owned(), Count { scope, pods });
    }

    /// A budget went.
    pub fn forget(&mut self, namespace: &str, key: &str) {
        if let Some(budgets) = self.budgets.get_mut(namespace) {
            budgets.remove(key);
            if budgets.is_empty() {
                self.budgets.remove(namespace);
            }
        }
    }
}
