package sds

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// resolve says what stands under a name for the owner of a snapshot. again is when
// that will have changed by itself, or zero. Names that are not in the snapshot
// are not there: it is the only source of rights.
func (s *Server) resolve(snapshot *identity.Snapshot, sub *subscription, now time.Time) (r resolution, again time.Time) {
	if snapshot == nil {
		return resolution{}, time.Time{} // nothing is known yet
	}
	if sub.kind == kindRoot {
		return s.resolveRoot(snapshot, sub.name), time.Time{}
	}
	return s.resolveLeaf(snapshot, sub, now)
}

func (s *Server) resolveRoot(snapshot *identity.Snapshot, name string) resolution {
	var found *secret
	var refusal *withheldError
	local := true
	switch name {
	case nameRoot:
		found, refusal = s.cache.root(snapshot.Bundle)
	case nameAll:
		found, refusal = s.cache.all(snapshot)
	default:
		bundle, isLocal := bundleOf(snapshot, strings.TrimPrefix(name, scheme))
		if bundle == nil {
			return resolution{action: actAbsent}
		}
		local = isLocal
		found, refusal = s.cache.root(bundle)
	}
	if refusal != nil {
		s.withhold(refusal)
		return resolution{}
	}
	r := resolution{action: actServe, secret: found, local: local}
	if local {
		r.sequence = snapshot.Bundle.Sequence
	}
	return r
}

// bundleOf returns the bundle of the trust domain of that name, or nil.
func bundleOf(snapshot *identity.Snapshot, name string) (b *identity.Bundle, local bool) {
	if b := snapshot.Bundle; b != nil && b.TrustDomain.Name() == name {
		return b, true
	}
	for td, b := range snapshot.Federated {
		if td.Name() == name && b != nil && b.TrustDomain == td {
			return b, false
		}
	}
	return nil, false
}

func (s *Server) resolveLeaf(snapshot *identity.Snapshot, sub *subscription, now time.Time) (r resolution, again time.Time) {
	var svid *identity.SVID
	if sub.name == nameDefault {
		svid = snapshot.Default()
	} else if i := slices.IndexFunc(snapshot.SVIDs, func(v *identity.SVID) bool { return v.ID.String() == sub.name }); i >= 0 {
		svid = snapshot.SVIDs[i]
	}
	if svid != nil {
		found, refusal := s.cache.leaf(svid, snapshot.Bundle, now)
		if refusal != nil {
			s.withhold(refusal)
			return resolution{}, refusal.until
		}
		return resolution{action: actServe, secret: found, leaf: svid.Chain[0]}, time.Time{}
	}
	if id := withdrawn(snapshot, sub); id != "" {
		stone, err := s.cache.tombstones(id)
		if err != nil {
			s.log.Error("withdrawn identity cannot be made useless at a proxy", "err", err)
			return resolution{stuck: true}, time.Time{}
		}
		return resolution{action: actServe, secret: stone}, time.Time{}
	}
	// The default identity is always still to come: its name claims nothing.
	if sub.name != nameDefault && (snapshot.Denied || len(snapshot.SVIDs) > 0) {
		return resolution{action: actAbsent}, time.Time{}
	}
	return resolution{}, time.Time{}
}

// withdrawn returns the SPIFFE ID of what stood under a name and was taken from the
// caller for good, or "". It rests on what the snapshot says, never on something
// missing from it: an identity that is not there may be on its way.
func withdrawn(snapshot *identity.Snapshot, sub *subscription) (id string) {
	listed := snapshot.Withdrawn
	switch {
	case sub.name != nameDefault:
		id = sub.name
	case len(snapshot.SVIDs) > 0:
		return "" // there is another default
	case sub.id != "":
		id = sub.id
	case len(listed) > 0:
		id = listed[0].String()
	case snapshot.Bundle != nil:
		// A proxy kept it over a restart of the agent, which does not know any
		// more what it was.
		id = snapshot.Bundle.TrustDomain.IDString() + identity.ReservedPath + "withdrawn"
	}
	switch {
	case snapshot.Denied && sub.delivered:
		return id
	case !sub.delivered && sub.tells:
		return ""
	case slices.ContainsFunc(listed, func(w spiffeid.ID) bool { return w.String() == id }):
		return id
	default:
		return ""
	}
}
