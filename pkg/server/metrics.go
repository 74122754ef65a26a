package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/server/registry"
)

// Stages of a request for X.509-SVIDs.
const (
	stageDecide = "decide"
	stageRecord = "record"
)

type metrics struct {
	issued        *prometheus.CounterVec
	refused       *prometheus.CounterVec
	suppressed    prometheus.Counter
	attestations  *prometheus.CounterVec
	renewals      prometheus.Counter
	clones        prometheus.Counter
	clockJumps    prometheus.Counter
	evictions     *prometheus.CounterVec
	quarantines   *prometheus.CounterVec
	entryChanges  *prometheus.CounterVec
	syncMessages  *prometheus.CounterVec
	handshakes    *prometheus.CounterVec
	rpcFailures   *prometheus.CounterVec
	panics        prometheus.Counter
	batchSize     prometheus.Histogram
	issueDuration prometheus.Histogram
	stages        *prometheus.HistogramVec
	attesting     *prometheus.HistogramVec
	withdrawals   *prometheus.CounterVec
	// withdrawalEffect has one observer a cause.
	withdrawalEffect map[string]observer
	revocationEffect observer
}

// observer observes the same value for many.
type observer struct{ prometheus.Observer }

func (o observer) observe(d time.Duration, n uint32) {
	for range n {
		o.Observe(d.Seconds())
	}
}

// newMetrics registers the server's metrics. Every series exists from the start.
func newMetrics(reg prometheus.Registerer, s *Server, methods []string) (*metrics, error) {
	counters := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	m := &metrics{
		issued: counters("meshid_ca_svids_issued_total",
			"X.509-SVIDs issued to workloads, by why they were asked for.", "kind"),
		refused: counters("meshid_ca_refusals_total",
			"Requests for an X.509-SVID, of workloads and agents, that were refused.", "reason"),
		suppressed: counter("meshid_ca_records_aggregated_total",
			"Refusals and ends of instances that were counted instead of recorded one by one."),
		attestations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_attestations_total", Help: "Attestations of nodes.",
		}, []string{"method", "outcome"}),
		renewals:   counter("meshid_ca_agent_renewals_total", "X.509-SVIDs of agents that were renewed."),
		clockJumps: counter("meshid_ca_clock_jumps_total", "Times that the CA's clock was set by more than five minutes."),
		clones: counter("meshid_ca_agent_clones_total",
			"Times that an agent presented an X.509-SVID that it had replaced."),
		evictions:   counters("meshid_ca_node_changes_total", "Changes of nodes by operators.", "action"),
		quarantines: counters("meshid_ca_quarantine_changes_total", "Quarantines that operators added and lifted.", "action"),
		entryChanges: counters("meshid_ca_entry_changes_total",
			"Registration entries that were created, changed or deleted.", "action"),
		syncMessages: counters("meshid_ca_sync_messages_total",
			"Snapshots and deltas of entries sent to agents.", "type"),
		handshakes: counters("meshid_ca_tls_handshakes_total", "TLS handshakes on the agents' listener.", "outcome"),
		rpcFailures: counters("meshid_ca_rpc_failures_total",
			"Calls that were answered with an error.", "kind"),
		panics: counter("meshid_ca_panics_total", "Panics in handlers, each answered as an internal error."),
		batchSize: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "meshid_ca_issue_batch_items", Help: "Items in one request for X.509-SVIDs.",
			Buckets:                     []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		issueDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "meshid_ca_issue_duration_seconds", Help: "Time from a request for X.509-SVIDs to its answer.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                        "meshid_ca_issue_stage_duration_seconds",
			Help:                        "Time of a request for X.509-SVIDs by stage: decide (rules, signatures, on all cores), record (until the ledger is durable).",
			Buckets:                     []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}, []string{"stage"}),
		attesting: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "meshid_ca_attestation_duration_seconds", Help: "Time of one attestation of a node, with the node's own part.",
			Buckets:                     []float64{.0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}, []string{"method"}),
	}
	effect := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:                        "meshid_ca_withdrawal_effect_seconds",
		Help:                        "From when something was withdrawn until a stream that carried it had acknowledged that it is gone, as the CA learned.",
		Buckets:                     []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
	}, []string{"cause"})
	revocation := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:                        "meshid_ca_revocation_effect_seconds",
		Help:                        "From when something was withdrawn until a stream of a proxy had acknowledged the revocation lists with it, as the CA learned.",
		Buckets:                     []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
	})
	m.revocationEffect = observer{revocation}
	m.withdrawals = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_withdrawals_total", Help: "Withdrawals that are over: complete, or incomplete if somebody was given up.",
	}, []string{"cause", "outcome"})
	m.withdrawalEffect = make(map[string]observer)
	for _, cause := range []string{withdrawalEntry, withdrawalNode, withdrawalQuarantine} {
		m.withdrawalEffect[cause] = observer{effect.WithLabelValues(cause)}
		for _, outcome := range []string{withdrawalComplete, withdrawalIncomplete} {
			m.withdrawals.WithLabelValues(cause, outcome)
		}
	}
	for _, stage := range []string{stageDecide, stageRecord} {
		m.stages.WithLabelValues(stage)
	}
	for _, kind := range []string{"first", "renewal", "rotation", "unspecified"} {
		m.issued.WithLabelValues(kind)
	}
	for _, reason := range refusalReasons {
		m.refused.WithLabelValues(reason)
	}
	for _, method := range append([]string{"unknown"}, methods...) {
		m.attesting.WithLabelValues(method)
		for _, outcome := range []string{"success", "refused", "error", "overload"} {
			m.attestations.WithLabelValues(method, outcome)
		}
	}
	for _, action := range []string{"evict", "ban", "unban"} {
		m.evictions.WithLabelValues(action)
	}
	for _, action := range []string{quarantineAdd, quarantineLift} {
		m.quarantines.WithLabelValues(action)
	}
	for _, action := range []string{actionCreated, actionChanged, actionDeleted} {
		m.entryChanges.WithLabelValues(action)
	}
	for _, typ := range []string{"snapshot", "delta"} {
		m.syncMessages.WithLabelValues(typ)
	}
	for _, outcome := range []string{"ok", "failed", "overload"} {
		m.handshakes.WithLabelValues(outcome)
	}
	for _, kind := range []string{
		"invalid", "not_found", "conflict", "denied", "unauthenticated", "overload", "unavailable", "canceled", "internal",
	} {
		m.rpcFailures.WithLabelValues(kind)
	}
	for _, c := range []prometheus.Collector{
		m.issued, m.refused, m.suppressed, m.attestations, m.renewals, m.clones, m.evictions, m.quarantines, m.entryChanges,
		m.syncMessages, m.handshakes, m.rpcFailures, m.panics, m.batchSize, m.issueDuration,
		m.stages, m.attesting, m.withdrawals, effect, revocation,
		nodesByState{s.registry},
		m.clockJumps,
		gauge("meshid_ca_clock_jump_seconds", "By how much the CA's clock was set, and not confirmed; 0 while it is relied on.", s.clockJump),
		gauge("meshid_ca_revision", "Revision of the last change of entries or trust bundle.",
			func() float64 { return float64(s.registry.Entries().Revision) }),
		gauge("meshid_ca_entries", "Registration entries in force.",
			func() float64 { return float64(s.registry.Entries().Set.Len()) }),
		gauge("meshid_ca_quarantines", "Identities, keys and certificates that are quarantined.",
			func() float64 { return float64(s.registry.Quarantines().Len()) }),
		gauge("meshid_ca_withdrawals_pending", "Withdrawals that a node or a stream has not carried out.",
			func() float64 { return float64(s.withdrawals.pending()) }),
		gauge("meshid_ca_nodes_connected", "Nodes with an open Sync stream.",
			func() float64 { return float64(s.hub.count()) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// nodesByState counts the nodes when it is asked.
type nodesByState struct{ registry *registry.Registry }

var nodesDesc = prometheus.NewDesc("meshid_ca_nodes",
	"Nodes that have attested and are not forgotten yet, by state: active, evicted or banned.", []string{"state"}, nil)

// Describe implements prometheus.Collector.
func (n nodesByState) Describe(ch chan<- *prometheus.Desc) { ch <- nodesDesc }

// Collect implements prometheus.Collector.
func (n nodesByState) Collect(ch chan<- prometheus.Metric) {
	count := n.registry.CountNodesByState()
	for _, state := range []registry.State{registry.Active, registry.Evicted, registry.Banned} {
		ch <- prometheus.MustNewConstMetric(nodesDesc, prometheus.GaugeValue, float64(count[state]), string(state))
	}
}
