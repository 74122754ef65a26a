package ca

import (
	"errors"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/ca/rotation"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Closed label sets, and the indexes of their counters.
const (
	kindFirst = iota
	kindRenewal
	kindRotation
	kindAgent
	kindOther
)

const (
	refusedCSR = iota
	refusedTTL
	refusedID
	refusedDNS
	refusedAuthority
	refusedSelfCheck
)

const (
	shrunkByPolicy = iota
	shrunkByAuthority
)

var (
	kindNames    = []string{kindFirst: "first", kindRenewal: "renewal", kindRotation: "rotation", kindAgent: "agent", kindOther: "other"}
	refusedNames = []string{
		refusedCSR: ReasonCSR, refusedTTL: ReasonTTL, refusedID: ReasonID, refusedDNS: ReasonDNS,
		refusedAuthority: "authority", refusedSelfCheck: "self_check",
	}
	shrunkNames = []string{shrunkByPolicy: "max_ttl", shrunkByAuthority: "authority_expiry"}
)

// metrics has its children resolved: the signing path looks nothing up.
type metrics struct {
	signed   []prometheus.Counter // by kind
	refused  []prometheus.Counter // by reason
	shrunk   []prometheus.Counter // by reason
	duration prometheus.Histogram

	rotated, rotationFailed prometheus.Counter

	rootNotAfter, intermediateNotAfter, ownNotAfter prometheus.Gauge

	retiring, sequence, converged prometheus.Gauge
	rootStates, holders, held     *prometheus.GaugeVec // by state of the root

	revoked                                              prometheus.Counter
	lists, listed, listBytes, listsInForce, listPrepared prometheus.Gauge

	upstreamOK, upstreamFailed prometheus.Counter
	upstreamDuration           prometheus.Histogram
	upstreamSuccess            prometheus.Gauge
}

var rootStates = []string{StatePrepared, StateDistributed, StateActive, StateRetiring}

// rootLabels are the state of a root, and whether it is tainted.
var rootLabels = []string{"state", "tainted"}

func (r *root) labels() [2]string { return [2]string{r.state, strconv.FormatBool(r.tainted)} }

// eachRootState sets a metric of roots for each of their states, tainted or not.
func eachRootState(vec *prometheus.GaugeVec, counts map[[2]string]int) {
	for _, state := range rootStates {
		for _, tainted := range []string{"false", "true"} {
			vec.WithLabelValues(state, tainted).Set(float64(counts[[2]string{state, tainted}]))
		}
	}
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	signed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_svid_signed_total",
		Help: "X.509-SVIDs signed, by why: first, renewal or rotation of a workload's, agent (a node agent's), other (the CA's own).",
	}, []string{"kind"})
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_sign_refused_total",
		Help: "Signatures refused, by reason. self_check: what was signed was not what was meant, nothing was released.",
	}, []string{"reason"})
	shrunk := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_svid_ttl_shrunk_total",
		Help: "X.509-SVIDs signed with a shorter life than asked for: max_ttl (policy) or authority_expiry (the issuer ends earlier).",
	}, []string{"reason"})
	rotations := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_intermediate_rotations_total",
		Help: "Attempts to replace the intermediate, by outcome.",
	}, []string{"outcome"})
	upstreams := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_upstream_requests_total",
		Help: "Requests to the upstream CA for an intermediate, or for each X.509-SVID if it signs these, by outcome. failure: no answer, a refusal, or an answer that does not hold what was asked for.",
	}, []string{"outcome"})
	notAfter := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "meshid_ca_authority_not_after_timestamp_seconds",
		Help: "When what signs now expires, by role: root, intermediate, server (the CA's own X.509-SVID).",
	}, []string{"role"})
	m := &metrics{
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_sign_duration_seconds",
			Help:                        "Time to validate, sign and check one X.509-SVID.",
			Buckets:                     prometheus.ExponentialBuckets(25e-6, 2, 14),
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		upstreamDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_upstream_duration_seconds",
			Help:                        "Time that the upstream CA took to answer a request, failures included.",
			Buckets:                     prometheus.ExponentialBuckets(0.01, 2, 14),
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		upstreamSuccess: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_upstream_last_success_timestamp_seconds",
			Help: "When the upstream CA last signed what this process asked for; 0 if it has not.",
		}),
		retiring: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_intermediates_retiring",
			Help: "Intermediates that sign no more while certificates that they signed live.",
		}),
		sequence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_bundle_sequence",
			Help: "Sequence of the trust bundle.",
		}),
		converged: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_bundle_converged_ratio",
			Help: "Part of the live nodes on which every proxy has acknowledged the trust bundle in force.",
		}),
		rootStates: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "meshid_ca_authority_rotation_state",
			Help: "Roots in the trust bundle by state, and whether they are tainted. More than one series above 0 means that a rotation is under way.",
		}, rootLabels),
	}
	m.revoked = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "meshid_ca_revoked_total",
		Help: "Certificates put on revocation lists.",
	})
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m.lists = gauge("meshid_ca_revocation_lists", "Revocation lists, one for each intermediate of which something may live; 0 unless the CA revokes by lists.")
	m.listed = gauge("meshid_ca_revocation_list_certificates", "Certificates on the revocation lists of this process's intermediates.")
	m.listBytes = gauge("meshid_ca_revocation_list_bytes", "Size of all revocation lists; each proxy has them, encoded a third larger.")
	m.listsInForce = gauge("meshid_ca_revocation_lists_in_force", "1 if the revocation lists are part of the trust bundle, 0 if not.")
	m.listPrepared = gauge("meshid_ca_revocation_waiting", "1 while a new intermediate does not sign for workloads since its revocation list is not in force everywhere.")
	m.holders = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "meshid_ca_bundle_trust_holders",
		Help: "Live nodes with X.509-SVIDs that chain to a root in this state, by what their agents say, and those that have not said.",
	}, rootLabels)
	m.held = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "meshid_ca_root_svids",
		Help: "X.509-SVIDs of live nodes that chain to a root in this state, by what their agents say.",
	}, rootLabels)
	var err error
	for _, collector := range []prometheus.Collector{
		m.holders, m.held, signed, refused, shrunk, rotations, notAfter, m.duration, m.retiring, m.sequence, m.converged, m.rootStates,
		m.revoked, m.lists, m.listed, m.listBytes, m.listsInForce, m.listPrepared, upstreams, m.upstreamDuration, m.upstreamSuccess,
	} {
		err = errors.Join(err, reg.Register(collector))
	}
	resolve := func(vec *prometheus.CounterVec, names []string) (all []prometheus.Counter) {
		for _, name := range names {
			all = append(all, vec.WithLabelValues(name))
		}
		return all
	}
	m.signed, m.refused, m.shrunk = resolve(signed, kindNames), resolve(refused, refusedNames), resolve(shrunk, shrunkNames)
	m.rotated, m.rotationFailed = rotations.WithLabelValues("success"), rotations.WithLabelValues("failure")
	m.upstreamOK, m.upstreamFailed = upstreams.WithLabelValues("success"), upstreams.WithLabelValues("failure")
	m.rootNotAfter, m.intermediateNotAfter = notAfter.WithLabelValues(RoleRoot), notAfter.WithLabelValues(RoleIntermediate)
	for _, vec := range []*prometheus.GaugeVec{m.rootStates, m.holders, m.held} {
		eachRootState(vec, nil)
	}
	m.converged.Set(1)
	m.ownNotAfter = notAfter.WithLabelValues("server")
	return m, err
}

func (m *metrics) observe(s *state) {
	m.rootNotAfter.Set(seconds(s.signer.cert.NotAfter))
	if s.active != nil {
		m.intermediateNotAfter.Set(seconds(s.active.notAfter))
	}
	m.retiring.Set(float64(len(s.retiring)))
	m.sequence.Set(float64(s.trust.Sequence))
	size := 0
	for _, l := range s.trust.Lists {
		size += len(l.List)
	}
	m.lists.Set(float64(len(s.trust.Lists)))
	m.listBytes.Set(float64(size))
	m.listsInForce.Set(boolean(s.trust.Listed))
	m.listPrepared.Set(boolean(s.next != nil))
	listed := 0
	for _, a := range s.own() {
		if a.listing != nil {
			listed += len(a.listing.revoked)
		}
	}
	m.listed.Set(float64(listed))
	count := make(map[[2]string]int)
	for _, r := range s.roots {
		count[r.labels()]++
	}
	eachRootState(m.rootStates, count)
}

// observeUpstream counts a request to the upstream CA that began at start.
func (m *metrics) observeUpstream(start time.Time, err error) {
	m.upstreamDuration.Observe(time.Since(start).Seconds())
	if err != nil {
		m.upstreamFailed.Inc()
		return
	}
	m.upstreamOK.Inc()
	m.upstreamSuccess.SetToCurrentTime()
}

func (m *metrics) observeFleet(in rotation.Inputs, s *state) {
	holders, held := make(map[[2]string]int), make(map[[2]string]int)
	for _, r := range s.roots {
		for _, n := range in.Nodes {
			if !n.Live(in.Now) {
				continue
			}
			if !n.Counted || n.Held[r.id] > 0 {
				holders[r.labels()]++
			}
			held[r.labels()] += int(n.Held[r.id])
		}
	}
	eachRootState(m.holders, holders)
	eachRootState(m.held, held)
	live := 0
	for _, n := range in.Nodes {
		if n.Live(in.Now) {
			live++
		}
	}
	if live == 0 {
		m.converged.Set(1)
		return
	}
	m.converged.Set(1 - float64(len(rotation.Waiting(in, s.trust.Sequence)))/float64(live))
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func seconds(t time.Time) float64 { return float64(t.Unix()) }

// kindOf is total: what it does not know is "other".
func kindOf(r *ledgerv1.Record) int {
	switch r.GetEvent() {
	case ledgerv1.Event_EVENT_ATTEST, ledgerv1.Event_EVENT_RENEW_AGENT:
		return kindAgent
	case ledgerv1.Event_EVENT_ISSUE:
		switch r.GetKind() {
		case ledgerv1.Kind_KIND_FIRST:
			return kindFirst
		case ledgerv1.Kind_KIND_RENEWAL:
			return kindRenewal
		case ledgerv1.Kind_KIND_ROTATION:
			return kindRotation
		default:
			return kindOther
		}
	default:
		return kindOther
	}
}
