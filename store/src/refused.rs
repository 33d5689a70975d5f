//! Why the state machine, or the checks before it, refused a request: etcd's own error table.
//!
//! Clients match on the text, so code and text are etcd's exactly (etcd: `api/v3/v3rpc/rpctypes/error.go`).

use tonic::{Code, Status};

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $code:ident, $text:literal;)*) => {
        /// One line of etcd's error table.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum Refused {
            $($(#[$doc])* #[error($text)] $name,)*
        }
        impl Refused {
            /// The gRPC code that etcd answers with.
            pub fn code(self) -> Code {
                match self { $(Self::$name => Code::$code,)* }
            }
            /// Every line of the table, for tests.
            pub const ALL: &[Refused] = &[$(Refused::$name,)*];
        }
    };
}

table! {
    /// A request without a key.
    EmptyKey = InvalidArgument, "etcdserver: key is not provided";
    /// A transaction compares or names a key that is not there although the request needs it (`ignore_value`, `ignore_lease`).
    KeyNotFound = InvalidArgument, "etcdserver: key not found";
    /// `ignore_value` together with a value.
    ValueProvided = InvalidArgument, "etcdserver: value is provided";
    /// `ignore_lease` together with a lease.
    LeaseProvided = InvalidArgument, "etcdserver: lease is provided";
    /// More operations than the limit in one transaction.
    TooManyOps = InvalidArgument, "etcdserver: too many operations in txn request";
    /// One transaction changes a key twice.
    DuplicateKey = InvalidArgument, "etcdserver: duplicate key given in txn request";
    /// A sort order or target that does not exist.
    InvalidSortOption = InvalidArgument, "etcdserver: invalid sort option";
    /// The revision was compacted away.
    Compacted = OutOfRange, "etcdserver: mvcc: required revision has been compacted";
    /// The revision is yet to come.
    FutureRevision = OutOfRange, "etcdserver: mvcc: required revision is a future revision";
    /// The quota is used up and the alarm is raised.
    NoSpace = ResourceExhausted, "etcdserver: mvcc: database space exceeded";
    /// The lease does not exist (any more).
    LeaseNotFound = NotFound, "etcdserver: requested lease not found";
    /// A lease of that id exists.
    LeaseExists = FailedPrecondition, "etcdserver: lease already exists";
    /// A time to live beyond 9,000,000,000 seconds.
    LeaseTtlTooLarge = OutOfRange, "etcdserver: too large lease TTL";
    /// A member of that id exists.
    MemberExists = FailedPrecondition, "etcdserver: member ID already exist";
    /// A member with one of the peer addresses exists.
    PeerUrlExists = FailedPrecondition, "etcdserver: Peer URLs already exists";
    /// Removing or adding the member would leave no quorum of started members.
    MemberNotEnoughStarted = FailedPrecondition, "etcdserver: re-configuration failed due to not enough started members";
    /// An address that cannot be parsed.
    MemberBadUrls = InvalidArgument, "etcdserver: given member URLs are invalid";
    /// No member of that id.
    MemberNotFound = NotFound, "etcdserver: member not found";
    /// Only a learner can be promoted.
    MemberNotLearner = FailedPrecondition, "etcdserver: can only promote a learner member";
    /// The learner has too much to catch up.
    LearnerNotReady = FailedPrecondition, "etcdserver: can only promote a learner member which is in sync with leader";
    /// A second learner.
    TooManyLearners = FailedPrecondition, "etcdserver: too many learner members in cluster";
    /// A learner answers no client but for its status.
    NotSupportedForLearner = Unavailable, "etcdserver: rpc not supported for learner";
    /// Larger than the limit of a request.
    RequestTooLarge = InvalidArgument, "etcdserver: request is too large";
    /// The queue of proposals is full.
    TooManyRequests = ResourceExhausted, "etcdserver: too many requests";
    /// There is no leader.
    NoLeader = Unavailable, "etcdserver: no leader";
    /// Leadership moved while the request was under way; whether it took effect is unknown.
    LeaderChanged = Unavailable, "etcdserver: leader changed";
    /// Only the leader can do that.
    NotLeader = FailedPrecondition, "etcdserver: not leader";
    /// The named member cannot take leadership.
    BadLeaderTransferee = FailedPrecondition, "etcdserver: bad leader transferee";
    /// The server is going down.
    Stopped = Unavailable, "etcdserver: server stopped";
    /// No answer in time; whether it took effect is unknown.
    Timeout = Unavailable, "etcdserver: request timed out";
    /// No answer in time because the leader failed.
    TimeoutLeaderFailed = Unavailable, "etcdserver: request timed out, possibly due to previous leader failure";
    /// No quorum.
    Unhealthy = Unavailable, "etcdserver: unhealthy cluster";
    /// The members disagree.
    Corrupt = DataLoss, "etcdserver: corrupt cluster";
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Status {
        Status::new(refused.code(), refused.to_string())
    }
}
