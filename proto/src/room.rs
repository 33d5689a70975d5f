//! Room that decoders leave behind.

use crate::v1::{Container, Object, PodSpec, PodStatus, object};

impl Object {
    /// Gives back the room in the lists of a pod that is there for more to come: a list that is read item by item has room for four from
    /// the first one on, and three containers that are not there are larger than the one that is. For whoever keeps the object.
    pub fn shrink_to_fit(&mut self) {
        let Some(object::Kind::Pod(pod)) = &mut self.kind else { return };
        if let Some(spec) = &mut pod.spec {
            shrink_spec(spec);
        }
        if let Some(PodStatus { conditions, init_container_statuses, container_statuses, pod_ips, host_ips, .. }) =
            &mut pod.status
        {
            conditions.shrink_to_fit();
            init_container_statuses.shrink_to_fit();
            container_statuses.shrink_to_fit();
            pod_ips.shrink_to_fit();
            host_ips.shrink_to_fit();
        }
    }
}

fn shrink_spec(spec: &mut PodSpec) {
    spec.containers.shrink_to_fit();
    spec.init_containers.shrink_to_fit();
    spec.volumes.shrink_to_fit();
    spec.tolerations.shrink_to_fit();
    for container in spec.containers.iter_mut().chain(&mut spec.init_containers) {
        let Container { command, args, ports, env, env_from, volume_mounts, .. } = container;
        command.shrink_to_fit();
        args.shrink_to_fit();
        ports.shrink_to_fit();
        env.shrink_to_fit();
        env_from.shrink_to_fit();
        volume_mounts.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::v1::{ContainerPort, EnvVar, Pod};

    #[test]
    fn what_was_read_takes_no_more_than_it_needs_and_is_the_same() {
        let mut pod = Pod::default();
        let container = Container {
            ports: vec![ContainerPort { container_port: 80, ..ContainerPort::default() }],
            env: vec![EnvVar { name: "A".into(), ..EnvVar::default() }],
            ..Container::default()
        };
        pod.spec_mut().containers = vec![container];
        let bytes = Object::from(pod).encode_to_vec();
        let [read, mut kept] = std::array::from_fn(|_| Object::decode(bytes.as_slice()).expect("decodes"));
        let capacity = |object: &Object| {
            let container = &object.as_pod().expect("a pod").spec().containers;
            (container.capacity(), container[0].ports.capacity(), container[0].env.capacity())
        };
        assert!(capacity(&kept) > (1, 1, 1), "decoding leaves room, or this is not needed any more");
        kept.shrink_to_fit();
        assert_eq!(capacity(&kept), (1, 1, 1));
        assert_eq!(kept, read);
    }

    #[test]
    fn rare_parts_of_a_pod_cost_those_that_lack_them_a_pointer() {
        // What a cache holds of every state of every pod; of these, half a kilobyte a container.
        assert!(size_of::<Container>() <= 640, "{}", size_of::<Container>());
        assert!(size_of::<Object>() <= 2_048, "{}", size_of::<Object>());
    }
}
