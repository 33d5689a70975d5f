//! What a pod needs and a node has, as numbers: the effective request (KEP-753, KEP-2837) and the fit of one in the other.

use std::{collections::BTreeMap, fmt};

use crate::{
    quantity::{Quantity, QuantityError},
    v1::{Container, Node, PodSpec, ResourceRequirements},
};

/// Resource name of CPU time.
pub const CPU: &str = "cpu";
/// Resource name of memory.
pub const MEMORY: &str = "memory";
/// Resource name of local disk.
pub const EPHEMERAL_STORAGE: &str = "ephemeral-storage";
/// Resource name of places for pods.
pub const PODS: &str = "pods";

/// An amount of every resource. Absent extended resources are 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu_milli: i64,
    /// Bytes.
    pub memory_bytes: i64,
    /// Bytes.
    pub ephemeral_bytes: i64,
    /// Number of pods.
    pub pods: i64,
    /// Everything else by name (`example.com/gpu`, `hugepages-2Mi`), whole units.
    pub extended: BTreeMap<String, i64>,
}

/// A sum of resources cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourceError {
    /// A resource's text is no quantity.
    #[error("{resource}: {source}")]
    Quantity {
        /// Name of the resource.
        resource: String,
        /// What is wrong with the text.
        source: QuantityError,
    },
    /// A sum does not fit 63 bits.
    #[error("the sum of {resource} is too large")]
    Overflow {
        /// Name of the resource.
        resource: String,
    },
}

impl Resources {
    /// From quantities by resource name; fractions of the unit are rounded up.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Resources, ResourceError> {
        let mut all = Resources::default();
        for (resource, text) in map {
            let parsed = text.parse::<Quantity>();
            let value = parsed.map_err(|source| ResourceError::Quantity { resource: resource.clone(), source })?;
            if resource == CPU && Quantity::from_milli(i64::MAX) < value {
                return Err(ResourceError::Overflow { resource: resource.clone() });
            }
            all.set(resource, if resource == CPU { value.milli_value_ceil() } else { value.value_ceil() });
        }
        Ok(all)
    }

    /// As quantities by resource name; what is 0 is left out.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.iter()
            .filter(|(_, amount)| *amount != 0)
            .map(|(name, amount)| (name.to_owned(), amount_text(name, amount)))
            .collect()
    }

    /// Amount of one resource (CPU in thousandths).
    pub fn get(&self, resource: &str) -> i64 {
        match resource {
            CPU => self.cpu_milli,
            MEMORY => self.memory_bytes,
            EPHEMERAL_STORAGE => self.ephemeral_bytes,
            PODS => self.pods,
            other => self.extended.get(other).copied().unwrap_or(0),
        }
    }

    /// Sets the amount of one resource (CPU in thousandths).
    pub fn set(&mut self, resource: &str, amount: i64) {
        match resource {
            CPU => self.cpu_milli = amount,
            MEMORY => self.memory_bytes = amount,
            EPHEMERAL_STORAGE => self.ephemeral_bytes = amount,
            PODS => self.pods = amount,
            other if amount == 0 => drop(self.extended.remove(other)),
            other => drop(self.extended.insert(other.to_owned(), amount)),
        }
    }

    /// Names and amounts: the four fixed ones, then the extended ones by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        let fixed = [
            (CPU, self.cpu_milli),
            (MEMORY, self.memory_bytes),
            (EPHEMERAL_STORAGE, self.ephemeral_bytes),
            (PODS, self.pods),
        ];
        fixed.into_iter().chain(self.extended.iter().map(|(name, amount)| (name.as_str(), *amount)))
    }

    /// The sum.
    pub fn checked_add(&self, other: &Resources) -> Result<Resources, ResourceError> {
        self.combine(other, i64::checked_add)
    }

    /// The difference; amounts may become negative.
    pub fn checked_sub(&self, other: &Resources) -> Result<Resources, ResourceError> {
        self.combine(other, i64::checked_sub)
    }

    /// The larger amount of every resource.
    pub fn max(&self, other: &Resources) -> Resources {
        let mut all = self.clone();
        for (name, amount) in other.iter() {
            if amount > all.get(name) {
                all.set(name, amount);
            }
        }
        all
    }

    fn combine(&self, other: &Resources, op: fn(i64, i64) -> Option<i64>) -> Result<Resources, ResourceError> {
        let mut all = self.clone();
        for (name, amount) in other.iter() {
            let value = op(all.get(name), amount);
            all.set(name, value.ok_or_else(|| ResourceError::Overflow { resource: name.to_owned() })?);
        }
        Ok(all)
    }

    /// What of this request does not fit into `free`; empty when all of it fits. A request of 0 always fits, also where
    /// less than nothing is free.
    pub fn shortfalls(&self, free: &Resources) -> Vec<Shortfall> {
        let wanted = self.iter().filter(|(_, amount)| *amount > 0);
        let short = wanted.filter(|(name, amount)| *amount > free.get(name));
        short
            .map(|(name, requested)| Shortfall { resource: name.to_owned(), requested, free: free.get(name) })
            .collect()
    }

    /// Whether this request fits into `free`.
    pub fn fits(&self, free: &Resources) -> bool {
        self.iter().all(|(name, amount)| amount <= 0 || amount <= free.get(name))
    }
}

/// One resource of which a node has too little. CPU in thousandths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortfall {
    /// Name of the resource.
    pub resource: String,
    /// What the pod asks for.
    pub requested: i64,
    /// What the node has left.
    pub free: i64,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missing = self.requested.saturating_sub(self.free);
        write!(f, "{} short by {}", self.resource, amount_text(&self.resource, missing))
    }
}

/// Canonical text of an amount (CPU in thousandths): bytes in powers of 1024, the rest in powers of ten.
pub fn amount_text(resource: &str, amount: i64) -> String {
    match resource {
        CPU => Quantity::from_milli(amount).to_string(),
        MEMORY | EPHEMERAL_STORAGE => Quantity::from_bytes(amount).to_string(),
        other if other.starts_with("hugepages-") => Quantity::from_bytes(amount).to_string(),
        _ => Quantity::from_units(amount).to_string(),
    }
}

/// What pods may use of a node.
pub fn node_allocatable(node: &Node) -> Result<Resources, ResourceError> {
    node.status.as_ref().map_or_else(|| Ok(Resources::default()), |status| Resources::from_map(&status.allocatable))
}

/// Requests of one container; a limit without a request is one.
pub fn container_requests(container: &Container) -> Result<Resources, ResourceError> {
    requirement(container.resources.as_ref(), true)
}

/// Limits of one container.
pub fn container_limits(container: &Container) -> Result<Resources, ResourceError> {
    requirement(container.resources.as_ref(), false)
}

fn requirement(resources: Option<&ResourceRequirements>, requests: bool) -> Result<Resources, ResourceError> {
    let Some(resources) = resources else { return Ok(Resources::default()) };
    let limits = Resources::from_map(&resources.limits)?;
    if !requests {
        return Ok(limits);
    }
    let mut all = Resources::from_map(&resources.requests)?;
    for (name, amount) in limits.iter() {
        if !resources.requests.contains_key(name) {
            all.set(name, amount);
        }
    }
    Ok(all)
}

/// What a pod takes of a node, with its place (`pods` = 1).
///
/// Per resource the larger one of what runs together at the end (apps and sidecars) and of what each init container needs
/// beside the sidecars started before it; requests of the pod as a whole replace that for CPU, memory and huge pages; then the overhead.
pub fn pod_requests(spec: &PodSpec) -> Result<Resources, ResourceError> {
    requests_by(spec, &container_requests)
}

/// The same with what each container counts with said by `of`.
pub(crate) fn requests_by(
    spec: &PodSpec,
    of: &dyn Fn(&Container) -> Result<Resources, ResourceError>,
) -> Result<Resources, ResourceError> {
    let mut all = aggregate(spec, of)?;
    replace_by_pod_level(&mut all, requirement(spec.resources.as_deref(), true)?);
    all = all.checked_add(&Resources::from_map(&spec.overhead)?)?;
    all.pods = 1;
    Ok(all)
}

/// The most that a pod may use; 0 where nothing limits it.
pub fn pod_limits(spec: &PodSpec) -> Result<Resources, ResourceError> {
    let mut all = aggregate(spec, &container_limits)?;
    replace_by_pod_level(&mut all, requirement(spec.resources.as_deref(), false)?);
    let overhead = Resources::from_map(&spec.overhead)?;
    for (name, amount) in overhead.iter() {
        let limit = all.get(name);
        if limit > 0 {
            let sum = limit.checked_add(amount).ok_or_else(|| ResourceError::Overflow { resource: name.to_owned() })?;
            all.set(name, sum);
        }
    }
    Ok(all)
}

fn aggregate(
    spec: &PodSpec,
    of: &dyn Fn(&Container) -> Result<Resources, ResourceError>,
) -> Result<Resources, ResourceError> {
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for container in &spec.init_containers {
        let with_it = sidecars.checked_add(&of(container)?)?;
        peak = peak.max(&with_it);
        if container.is_sidecar() {
            sidecars = with_it;
        }
    }
    let mut together = sidecars;
    for container in &spec.containers {
        together = together.checked_add(&of(container)?)?;
    }
    Ok(together.max(&peak))
}

fn replace_by_pod_level(all: &mut Resources, pod_level: Resources) {
    for (name, amount) in pod_level.iter() {
        if amount > 0 && (name == CPU || name == MEMORY || name.starts_with("hugepages-")) {
            all.set(name, amount);
        }
    }
}

/// Quality of service: who is reclaimed first when a node runs short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QosClass {
    /// Every container has CPU and memory limits equal to its requests.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

impl QosClass {
    /// The name in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            QosClass::Guaranteed => "Guaranteed",
            QosClass::Burstable => "Burstable",
            QosClass::BestEffort => "BestEffort",
        }
    }
}

/// The class of a pod (init containers and sidecars count; resources of the pod as a whole, if any, decide alone).
pub fn qos_class(spec: &PodSpec) -> Result<QosClass, ResourceError> {
    let of = |resources: Option<&ResourceRequirements>| -> Result<(Resources, Resources), ResourceError> {
        Ok((requirement(resources, true)?, requirement(resources, false)?))
    };
    let pod_level = spec.resources.as_ref().filter(|all| !all.requests.is_empty() || !all.limits.is_empty());
    let pairs: Vec<(Resources, Resources)> = match pod_level {
        Some(resources) => vec![of(Some(resources))?],
        None => {
            let containers = spec.init_containers.iter().chain(&spec.containers);
            containers.map(|container| of(container.resources.as_ref())).collect::<Result<_, _>>()?
        }
    };
    let named = |all: &Resources| all.cpu_milli != 0 || all.memory_bytes != 0;
    if pairs.iter().all(|(requests, limits)| !named(requests) && !named(limits)) {
        return Ok(QosClass::BestEffort);
    }
    let guaranteed = pairs.iter().all(|(requests, limits)| {
        let (cpu, memory) = (limits.cpu_milli, limits.memory_bytes);
        cpu > 0 && memory > 0 && requests.cpu_milli == cpu && requests.memory_bytes == memory
    });
    Ok(if guaranteed { QosClass::Guaranteed } else { QosClass::Burstable })
}

#[cfg(test)]
#[path = "resources_tests.rs"]
mod tests;
