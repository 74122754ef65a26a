package agent

import (
	"time"

	"github.com/meshid/meshid/pkg/health"
)

// Status is a picture of an agent, as `node-agent status` shows it. It holds
// nothing secret.
type Status struct {
	// NodeID is the agent's SPIFFE ID; empty before the node is attested.
	NodeID      string `json:"node_id"`
	TrustDomain string `json:"trust_domain"`
	Version     string `json:"version"`
	CAAddress   string `json:"ca_address"`
	Connected   bool   `json:"connected"`
	// Since is when the session with the CA began or ended.
	Since time.Time `json:"since"`
	// LastError is why there is no session.
	LastError string `json:"last_error,omitempty"`
	// ClockSkewSeconds is how far this machine's clock is ahead of the CA's;
	// absent while it is not known.
	ClockSkewSeconds *float64 `json:"clock_skew_seconds,omitempty"`
	Epoch            string   `json:"epoch"`
	Revision         uint64   `json:"revision"`
	BundleSequence   uint64   `json:"bundle_sequence"`
	Roots            int      `json:"roots"`
	Entries          int      `json:"entries"`
	// Skipped are entries that this agent cannot compile.
	Skipped int `json:"entries_skipped"`
	// NotAfter and RenewAt are those of the agent's own X.509-SVID.
	NotAfter time.Time `json:"not_after,omitzero"`
	RenewAt  time.Time `json:"renew_at,omitzero"`
	// Streams are open; BundleStreams of them carry trust bundles, and
	// Acknowledged of those have the one in force.
	Streams       int `json:"streams"`
	BundleStreams int `json:"bundle_streams"`
	Acknowledged  int `json:"acknowledged"`
	// OutageBudget is how long it would take until the first workload had no
	// X.509-SVID, if the CA went away now; empty if there is none.
	OutageBudget string             `json:"outage_budget,omitempty"`
	Instances    []InstanceStatus   `json:"instances"`
	Conditions   []health.Condition `json:"conditions"`
}

// InstanceStatus is one workload instance.
type InstanceStatus struct {
	Instance string `json:"instance"`
	// Announced says that the runtime knows it.
	Announced  bool             `json:"announced"`
	Streams    int              `json:"streams"`
	Identities []IdentityStatus `json:"identities"`
}

// IdentityStatus is one identity of an instance.
type IdentityStatus struct {
	SPIFFEID string `json:"spiffe_id"`
	Entry    string `json:"entry"`
	// State is "ok", "renewing", "waiting" (for the first X.509-SVID) or
	// "failing".
	State    string    `json:"state"`
	Serial   string    `json:"serial,omitempty"`
	NotAfter time.Time `json:"not_after,omitzero"`
	// RenewAt is when the CA is asked next.
	RenewAt  time.Time `json:"renew_at,omitzero"`
	Failures int       `json:"failures,omitempty"`
	// Reason is why the last request failed.
	Reason string `json:"reason,omitempty"`
}

// Status describes the agent for people and scripts.
func (a *Agent) Status() Status {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Status{
		TrustDomain: a.cfg.TrustDomain.Name(),
		Version:     a.cfg.Version,
		CAAddress:   a.cfg.CAAddress,
		Connected:   a.session != nil,
		Since:       a.since.Round(0),
		LastError:   a.lastError,
		Epoch:       a.epoch,
		Revision:    a.revision,
		Streams:     len(a.streams),
		Instances:   []InstanceStatus{},
		Conditions:  a.cfg.Health.Conditions(),
	}
	if a.skew.known {
		by := a.skew.by.Seconds()
		s.ClockSkewSeconds = &by
	}
	if a.entries != nil {
		s.Entries, s.Skipped = a.entries.Len(), len(a.raw)-a.entries.Len()
	}
	if a.bundle != nil {
		s.BundleSequence, s.Roots = a.bundle.Sequence, len(a.bundle.Roots)
	}
	if a.own != nil {
		s.NodeID, s.NotAfter, s.RenewAt = a.own.id.String(), a.own.notAfter(), a.own.renewAt.Round(0)
	}
	acks := a.countAcks()
	s.BundleStreams, s.Acknowledged = int(acks.GetStreams()), int(acks.GetAcknowledged())
	var first time.Time
	for _, i := range a.cache.Instances() {
		d := InstanceStatus{Instance: i.Name, Announced: i.Announced, Streams: i.Watches, Identities: []IdentityStatus{}}
		for _, c := range i.Identities {
			one := IdentityStatus{
				SPIFFEID: c.ID.String(), Entry: c.Entry, RenewAt: c.Due.Round(0), Failures: c.Failures, Reason: c.Reason,
			}
			if c.SVID != nil {
				one.Serial, one.NotAfter = serialText(c.SVID.Chain[0].SerialNumber), c.SVID.NotAfter()
				if first.IsZero() || one.NotAfter.Before(first) {
					first = one.NotAfter
				}
			}
			switch {
			case c.Failures > 0:
				one.State = "failing"
			case c.SVID == nil:
				one.State = "waiting"
			case c.Asking:
				one.State = "renewing"
			default:
				one.State = "ok"
			}
			d.Identities = append(d.Identities, one)
		}
		s.Instances = append(s.Instances, d)
	}
	if !first.IsZero() {
		s.OutageBudget = max(first.Sub(now.Round(0)), 0).Round(time.Second).String()
	}
	return s
}
