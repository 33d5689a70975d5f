//! An etcd v3 server on raft: minipod's embedded store.
