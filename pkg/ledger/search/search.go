// Package search is what can be asked of the records of a ledger, and what the
// answers are made of: the words that the store, which finds, and the server and
// its clients, who ask, have in common. It finds nothing itself.
package search

import (
	"iter"
	"slices"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
)

// MaxFound bounds what one question returns; Position says how to go on.
const MaxFound = 1000

// MaxLife is that of the longest X.509-SVID, with some more: what was issued
// earlier has expired. What may still be valid is never archived.
const MaxLife = 26 * time.Hour

// BehindTrailer is the trailer of an answer that lacks the newest records, because
// the index has not taken them: their number.
const BehindTrailer = "meshid-records-behind"

// State says whether an X.509-SVID is in use, as far as the CA knows. It is valid
// until it expires in any case.
type State int

const (
	// Current is in use.
	Current State = iota
	// Replaced is by a newer one of the same instance.
	Replaced
	// Dropped is that of an instance that ended: the agent dropped
	// the key.
	Dropped
	// Withdrawn is through a node that was evicted or banned.
	Withdrawn
)

// String returns the state's name.
func (s State) String() string {
	switch s {
	case Current:
		return "current"
	case Replaced:
		return "replaced"
	case Dropped:
		return "dropped"
	case Withdrawn:
		return "withdrawn"
	default:
		return "unknown"
	}
}

// Position is where a list goes on: behind the row with this key and record. The
// zero value is the beginning.
type Position struct {
	Key    int64
	Record uint64
	Valid  bool
}

// Query says which records are wanted: those for which everything that is set
// holds.
type Query struct {
	SPIFFEID, Node, Entry, Authority, Reason, Actor, RequestID string

	Event   ledgerv1.Event
	Outcome ledgerv1.Outcome
	// Revision is that of the entry; 0 for any.
	Revision uint64
	// Serial, SHA256 and SPKI are of a certificate that was issued.
	Serial, SHA256, SPKI []byte
	// Anomaly is the name of a rule.
	Anomaly string
	// Since is inclusive, Until is not.
	Since, Until time.Time
	// Oldest lists the oldest first, else it is the newest.
	Oldest bool
	// Limit is at most MaxFound, which is what 0 means.
	Limit int
	After Position
}

// Holders says which certificates are wanted: those for which all names that are
// set hold.
type Holders struct {
	SPIFFEID, Node, Entry string
	// Authorities are those of which one has to have signed; none for any.
	Authorities []string
	// At is when they are to be valid; required.
	At time.Time
	// Current leaves out what was replaced, dropped or withdrawn by then.
	Current bool
	Limit   int
	After   Position
}

// Found is a record that was found.
type Found struct {
	ledger.Entry
	// Anomalies are the names of the rules by which it is unusual.
	Anomalies []string
	// State is that of the certificate, in lists of certificates.
	State State
	// Since is from when on it has been in that state; in a list of those that are
	// overdue, when it should have been replaced.
	Since time.Time
	// ReplacedBy is the index of the record of the one that replaced it, if one
	// did.
	ReplacedBy *uint64
	// Fresh says that the identity was seen on no node before, in a list of those
	// first seen.
	Fresh bool
}

// Anomaly is a rule by which a record is unusual, given those before it.
type Anomaly int

const (
	// NewIdentityOnNode is the first X.509-SVID for this identity through this node.
	NewIdentityOnNode Anomaly = iota
	// IdentityFanOut says that the node has got X.509-SVIDs for more than ten identities,
	// and for more than twice as many as 99 % of the other nodes, of which there
	// are at least five.
	IdentityFanOut
	// KeyReuse says that the same public key was certified for another identity.
	KeyReuse
	// ImageDigestChange says that an X.509-SVID was replaced by one for an instance with
	// another image digest. Containers keep their image.
	ImageDigestChange
	// AgentClone says that an agent came with an X.509-SVID that it had replaced.
	AgentClone
	// Rules is their number.
	Rules = iota
)

// Anomalies are the names of all rules, in the order of their values: a closed
// set.
var Anomalies = []string{"new_identity_on_node", "identity_fan_out", "key_reuse", "image_digest_change", "agent_clone"}

// String returns the rule's name.
func (a Anomaly) String() string {
	if a < 0 || a >= Rules {
		return "unknown"
	}
	return Anomalies[a]
}

// ParseAnomaly returns the rule of this name.
func ParseAnomaly(name string) (Anomaly, bool) {
	i := slices.Index(Anomalies, name)
	return Anomaly(i), i >= 0
}

// AnomalySet has one bit a rule.
type AnomalySet int64

// Add adds a rule.
func (s *AnomalySet) Add(a Anomaly) { *s |= 1 << a }

// All returns the rules in s.
func (s AnomalySet) All() iter.Seq[Anomaly] {
	return func(yield func(Anomaly) bool) {
		for a := range Anomaly(Rules) {
			if s&(1<<a) != 0 && !yield(a) {
				return
			}
		}
	}
}

// Names returns the names of the rules in s.
func (s AnomalySet) Names() []string {
	var list []string
	for a := range s.All() {
		list = append(list, a.String())
	}
	return list
}
