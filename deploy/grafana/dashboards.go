package main

// kind is a type of panel in Grafana's words.
type kind string

const (
	stat  kind = "stat"
	graph kind = "timeseries"
)

// query is one expression; $instance is the dashboard's variable.
type query struct{ expr, legend string }

// panel is one question.
type panel struct {
	kind    kind
	title   string
	about   string
	unit    string
	queries []query
	bad     float64 // from here on it is red
	low     float64 // below this it is red
}

type dashboard struct {
	name, title, description string
	program                  string // "ca" or "agent": what $instance chooses from
	panels                   []panel
}

// quantiles are the percentiles of a histogram: of the classic buckets, or of the
// native histogram where Prometheus has only that.
func quantiles(metric, by string) []query {
	var all []query
	for _, q := range []struct{ phi, legend string }{{"0.5", "p50"}, {"0.99", "p99"}} {
		classic, native, legend := "by (le) ", "", q.legend
		if by != "" {
			classic, native, legend = "by (le, "+by+") ", "by ("+by+") ", q.legend+" {{"+by+"}}"
		}
		part := func(grouping, suffix string) string {
			return "histogram_quantile(" + q.phi + ", sum " + grouping + "(rate(" + metric + suffix + `{instance=~"$instance"}[$__rate_interval])))`
		}
		all = append(all, query{part(classic, "_bucket") + " or " + part(native, ""), legend})
	}
	return all
}

// rate is the rate of a counter by a label, or of all of it.
func rate(metric, by string) query {
	if by == "" {
		return query{`sum(rate(` + metric + `{instance=~"$instance"}[$__rate_interval]))`, "all"}
	}
	return query{`sum by (` + by + `) (rate(` + metric + `{instance=~"$instance"}[$__rate_interval]))`, "{{" + by + "}}"}
}

// of adds up a gauge.
func of(metric string) string { return `sum(` + metric + `{instance=~"$instance"})` }

var dashboards = []dashboard{
	{
		name: "issuance", title: "issuance", program: "ca",
		description: "Are X.509-SVIDs issued, how fast, and is the record of each durable?",
		panels: []panel{
			{kind: stat, title: "Issued a second", unit: "ops", queries: []query{rate("meshid_ca_svids_issued_total", "")}},
			{kind: stat, title: "Refused a second", unit: "ops", queries: []query{rate("meshid_ca_refusals_total", "")}},
			{kind: stat, title: "p99", unit: "s", bad: 0.25, queries: quantiles("meshid_ca_issue_duration_seconds", "")[1:]},
			{kind: stat, title: "Ledger writable", unit: "bool_yes_no", low: 1, queries: []query{{`min(meshid_ca_ledger_writable{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "X.509-SVIDs in use", unit: "none", queries: []query{{of("meshid_ca_active_svids"), ""}}},
			{kind: stat, title: "Overloads a second", unit: "ops", bad: 0.01, queries: []query{{`sum(rate(meshid_ca_rpc_failures_total{instance=~"$instance",kind="overload"}[$__rate_interval]))`, ""}}},
			{kind: stat, title: "Conditions", about: "Named conditions that are not ok; `ca status` explains them.", unit: "none", bad: 1, queries: []query{{`sum(meshid_ca_condition{instance=~"$instance"} > bool 0)`, ""}}},
			{kind: graph, title: "X.509-SVIDs issued, by why", unit: "ops", queries: []query{rate("meshid_ca_svids_issued_total", "kind")}},
			{kind: graph, title: "Refusals, by reason", unit: "ops", queries: []query{rate("meshid_ca_refusals_total", "reason")}},
			{kind: graph, title: "Time from request to answer", unit: "s", queries: quantiles("meshid_ca_issue_duration_seconds", "")},
			{kind: graph, title: "Time by stage", about: "decide: rules and signatures; record: until the ledger is durable.", unit: "s", queries: quantiles("meshid_ca_issue_stage_duration_seconds", "stage")},
			{kind: graph, title: "Time to sign one", unit: "s", queries: quantiles("meshid_ca_sign_duration_seconds", "")},
			{kind: graph, title: "Time of an fsync", unit: "s", queries: quantiles("meshid_ca_ledger_fsync_duration_seconds", "")},
			{kind: graph, title: "X.509-SVIDs in use that expire within", unit: "none", queries: []query{{`sum by (bucket) (meshid_ca_svid_expiring{instance=~"$instance"})`, "{{bucket}}"}}},
			{kind: graph, title: "Items in a request", unit: "none", queries: quantiles("meshid_ca_issue_batch_items", "")},
			{kind: graph, title: "Records that share an fsync", unit: "none", queries: quantiles("meshid_ca_ledger_batch_records", "")},
			{kind: graph, title: "Calls that failed, by kind", unit: "ops", queries: []query{rate("meshid_ca_rpc_failures_total", "kind")}},
			{kind: graph, title: "Processor time", about: "Cores in use.", unit: "none", queries: []query{{`rate(process_cpu_seconds_total{job="meshid-ca",instance=~"$instance"}[$__rate_interval])`, "{{instance}}"}}},
		},
	},
	{
		name: "authorities", title: "authorities and countdowns", program: "ca",
		description: "Which authority signs, until when, and what depends on which.",
		panels: []panel{
			{kind: stat, title: "Root ends in", unit: "s", low: 90 * 86400, queries: []query{{`min(meshid_ca_authority_not_after_timestamp_seconds{instance=~"$instance",role="root"}) - time()`, ""}}},
			{kind: stat, title: "Intermediate ends in", unit: "s", low: 86400, queries: []query{{`min(meshid_ca_authority_not_after_timestamp_seconds{instance=~"$instance",role="intermediate"}) - time()`, ""}}},
			{kind: stat, title: "CA's own X.509-SVID ends in", unit: "s", low: 300, queries: []query{{`min(meshid_ca_authority_not_after_timestamp_seconds{instance=~"$instance",role="server"}) - time()`, ""}}},
			{kind: stat, title: "Trust bundle's sequence", unit: "none", queries: []query{{`max(meshid_ca_bundle_sequence{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Retiring intermediates", unit: "none", queries: []query{{of("meshid_ca_intermediates_retiring"), ""}}},
			{kind: stat, title: "Signatures that failed the self-check", unit: "none", bad: 1, queries: []query{{`sum(meshid_ca_sign_refused_total{instance=~"$instance",reason="self_check"})`, ""}}},
			{kind: graph, title: "Remaining life", unit: "s", queries: []query{{`meshid_ca_authority_not_after_timestamp_seconds{instance=~"$instance"} - time()`, "{{role}} {{instance}}"}}},
			{kind: graph, title: "Roots in the trust bundle, by state", about: "More than one state above 0: a rotation is under way.", unit: "none", queries: []query{{`sum by (state, tainted) (meshid_ca_authority_rotation_state{instance=~"$instance"})`, "{{state}}, tainted: {{tainted}}"}}},
			{kind: stat, title: "Nodes that hold an old root", about: "Live nodes with X.509-SVIDs that chain to a root that is retiring or tainted, or that have not said: `ca who --root ID` names them.", unit: "none", bad: 1, queries: []query{{`max(sum by (instance) (meshid_ca_bundle_trust_holders{instance=~"$instance",state="retiring"} or meshid_ca_bundle_trust_holders{instance=~"$instance",tainted="true"}))`, ""}}},
			{kind: graph, title: "X.509-SVIDs, by state of their root", unit: "none", queries: []query{{`max by (state, tainted) (meshid_ca_root_svids{instance=~"$instance"})`, "{{state}}, tainted: {{tainted}}"}}},
			{kind: graph, title: "Replaced intermediates, by outcome", unit: "none", queries: []query{{`sum by (outcome) (increase(meshid_ca_intermediate_rotations_total{instance=~"$instance"}[1d]))`, "{{outcome}}"}}},
			{kind: graph, title: "Upstream CA: requests, by outcome", about: "For an intermediate. Nothing here without an upstream CA.", unit: "none", queries: []query{{`sum by (outcome) (increase(meshid_ca_upstream_requests_total{instance=~"$instance"}[1d]))`, "{{outcome}}"}}},
			{kind: graph, title: "Upstream CA: time to answer", about: "Failures included. Nothing here without an upstream CA.", unit: "s", queries: quantiles("meshid_ca_upstream_duration_seconds", "")},
			{kind: graph, title: "Upstream CA: last success", about: "Time since the upstream CA last certified an intermediate; 0 if it never has.", unit: "s", queries: []query{{`(time() - meshid_ca_upstream_last_success_timestamp_seconds{instance=~"$instance"}) * (meshid_ca_upstream_last_success_timestamp_seconds{instance=~"$instance"} > bool 0)`, "{{instance}}"}}},
			{kind: graph, title: "Lives cut short, by reason", about: "max_ttl: policy; authority_expiry: the issuer ends earlier.", unit: "ops", queries: []query{rate("meshid_ca_svid_ttl_shrunk_total", "reason")}},
			{kind: graph, title: "Signatures refused, by reason", unit: "ops", queries: []query{rate("meshid_ca_sign_refused_total", "reason")}},
		},
	},
	{
		name: "rotation", title: "rotation", program: "agent",
		description: "Does what was renewed reach the proxies, and do they put it into force?",
		panels: []panel{
			{kind: stat, title: "X.509-SVIDs at hand", unit: "none", queries: []query{{of("meshid_agent_cache_svids"), ""}}},
			{kind: stat, title: "Overdue", unit: "none", bad: 1, queries: []query{{of("meshid_agent_serving_stale_svids"), ""}}},
			{kind: stat, title: "Proxies that refuse", unit: "none", bad: 1, queries: []query{{of("meshid_agent_sds_rejecting_streams"), ""}}},
			{kind: stat, title: "Streams not acknowledged", unit: "none", queries: []query{{of("meshid_agent_sds_unacknowledged_streams"), ""}}},
			{kind: stat, title: "Streams that wait for an identity", unit: "none", queries: []query{{of("meshid_agent_sds_held_streams"), ""}}},
			{kind: stat, title: "Bundle acknowledged", about: "Part of the live nodes on which every proxy has acknowledged the trust bundle in force.", unit: "percentunit", queries: []query{{`min(meshid_ca_bundle_converged_ratio)`, ""}}},
			{kind: stat, title: "Overdue in the ledger", about: "In use, valid, and past the time of their renewal: `ca ledger overdue` lists them.", unit: "none", bad: 1, queries: []query{{`sum(meshid_ca_svid_overdue_renewal)`, ""}}},
			{kind: stat, title: "Oldest bundle in force", about: "Smallest sequence of all agents.", unit: "none", queries: []query{{`min(meshid_agent_bundle_sequence{instance=~"$instance"})`, ""}}},
			{kind: graph, title: "Renewals, by why and outcome", unit: "ops", queries: []query{{`sum by (kind, outcome) (rate(meshid_agent_renewals_total{instance=~"$instance"}[$__rate_interval]))`, "{{kind}} {{outcome}}"}}},
			{kind: graph, title: "Planned until in hand", unit: "s", queries: quantiles("meshid_agent_renewal_lag_seconds", "")},
			{kind: graph, title: "Pushed until acknowledged", unit: "s", queries: quantiles("meshid_agent_sds_ack_seconds", "")},
			{kind: graph, title: "Connected until the first X.509-SVID", unit: "s", queries: quantiles("meshid_agent_first_svid_seconds", "")},
			{kind: graph, title: "Acknowledged, by protocol", unit: "ops", queries: []query{rate("meshid_agent_sds_acks_total", "protocol")}},
			{kind: graph, title: "Refused by proxies, by reason", unit: "ops", queries: []query{rate("meshid_agent_sds_nacks_total", "reason")}},
			{kind: graph, title: "Issued again after a proxy refused", unit: "ops", queries: []query{rate("meshid_agent_rejected_svids_total", "outcome")}},
			{kind: graph, title: "Agents, by bundle in force", unit: "none", queries: []query{{`count_values("sequence", meshid_agent_bundle_sequence{instance=~"$instance"})`, "bundle {{sequence}}"}}},
			{kind: graph, title: "First X.509-SVID to expire, in", unit: "s", queries: []query{{`min(meshid_agent_svid_min_not_after_timestamp_seconds{instance=~"$instance"} > 0) - time()`, "first of all"}}},
		},
	},
	{
		name: "security", title: "security", program: "ca",
		description: "Who asks for what is not theirs, and what changed?",
		panels: []panel{
			{kind: stat, title: "Cloned agents", about: "Times that an agent came with an X.509-SVID that it had replaced.", unit: "none", bad: 1, queries: []query{{`sum(meshid_ca_agent_clones_total{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Anomalies today", about: "`ca ledger find --anomaly RULE` lists them.", unit: "none", queries: []query{{`sum(increase(meshid_ca_anomalies_total{instance=~"$instance"}[1d]))`, ""}}},
			{kind: stat, title: "Ledger's tree halted", about: "Tree, journal and witnesses disagree: find out why before anything else.", unit: "bool_yes_no", bad: 1, queries: []query{{`max(meshid_ca_ledger_tree_halted{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Banned nodes", unit: "none", queries: []query{{`sum(meshid_ca_nodes{instance=~"$instance",state="banned"})`, ""}}},
			{kind: stat, title: "Attestations refused today", unit: "none", queries: []query{{`sum(increase(meshid_ca_attestations_total{instance=~"$instance",outcome="refused"}[1d]))`, ""}}},
			{kind: stat, title: "Refusals today", unit: "none", queries: []query{{`sum(increase(meshid_ca_refusals_total{instance=~"$instance"}[1d]))`, ""}}},
			{kind: stat, title: "Changes of entries today", unit: "none", queries: []query{{`sum(increase(meshid_ca_entry_changes_total{instance=~"$instance"}[1d]))`, ""}}},
			{kind: stat, title: "Panics", unit: "none", bad: 1, queries: []query{{`sum(meshid_ca_panics_total{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Withdrawals pending", about: "Somebody has not carried them out: `ca withdrawal list`.", unit: "none", queries: []query{{of("meshid_ca_withdrawals_pending"), ""}}},
			{kind: graph, title: "Withdrawn until acknowledged, by cause", about: "For each stream: time to effect.", unit: "s", queries: quantiles("meshid_ca_withdrawal_effect_seconds", "cause")},
			{kind: graph, title: "Refusals, by reason", unit: "ops", queries: []query{rate("meshid_ca_refusals_total", "reason")}},
			{kind: graph, title: "Anomalies, by rule", unit: "none", queries: []query{{`sum by (rule) (increase(meshid_ca_anomalies_total{instance=~"$instance"}[1h]))`, "{{rule}}"}}},
			{kind: graph, title: "Attestations of nodes, by method and outcome", unit: "ops", queries: []query{{`sum by (method, outcome) (rate(meshid_ca_attestations_total{instance=~"$instance"}[$__rate_interval]))`, "{{method}} {{outcome}}"}}},
			{kind: graph, title: "TokenReviews, by cluster and outcome", about: "Agents that attest with k8s_psat, and Istio's proxies. Refused: the cluster says no. Error: nobody knows.", unit: "ops", queries: []query{{`sum by (cluster, outcome) (rate(meshid_ca_kubernetes_token_reviews_total{instance=~"$instance"}[$__rate_interval]))`, "{{cluster}} {{outcome}}"}}},
			{kind: graph, title: "TLS handshakes, by outcome", unit: "ops", queries: []query{rate("meshid_ca_tls_handshakes_total", "outcome")}},
			{kind: graph, title: "Changes of entries and nodes", unit: "none", queries: []query{
				{`sum by (action) (increase(meshid_ca_entry_changes_total{instance=~"$instance"}[1h]))`, "entry {{action}}"},
				{`sum by (action) (increase(meshid_ca_node_changes_total{instance=~"$instance"}[1h]))`, "node {{action}}"},
			}},
			{kind: graph, title: "Clock of the CA was set by", unit: "s", queries: []query{{`max by (instance) (abs(meshid_ca_clock_jump_seconds{instance=~"$instance"}))`, "{{instance}}"}}},
			{kind: graph, title: "Connections refused by agents, by reason", unit: "ops", queries: []query{{`sum by (reason) (rate(meshid_agent_peer_refusals_total[$__rate_interval]))`, "{{reason}}"}}},
			{kind: graph, title: "Workload attestations, by method and outcome", unit: "ops", queries: []query{{`sum by (method, outcome) (rate(meshid_agent_workload_attestations_total[$__rate_interval]))`, "{{method}} {{outcome}}"}}},
		},
	},
	{
		name: "fleet", title: "fleet", program: "agent",
		description: "Are the agents connected, up to date, and healthy?",
		panels: []panel{
			{kind: stat, title: "Nodes connected", unit: "none", queries: []query{{`sum(meshid_ca_nodes_connected)`, ""}}},
			{kind: stat, title: "Nodes, active", unit: "none", queries: []query{{`max(meshid_ca_nodes{state="active"})`, ""}}},
			{kind: stat, title: "Agents without the CA", unit: "none", bad: 1, queries: []query{{`sum(meshid_agent_ca_unreachable_seconds{instance=~"$instance"} > bool 60)`, ""}}},
			{kind: stat, title: "Agents behind in entries", unit: "none", queries: []query{{`sum(meshid_agent_revision{instance=~"$instance"} < bool scalar(max(meshid_ca_revision)))`, ""}}},
			{kind: stat, title: "Workload instances", unit: "none", queries: []query{{of("meshid_agent_instances"), ""}}},
			{kind: stat, title: "Conditions", unit: "none", bad: 1, queries: []query{{`sum(meshid_agent_condition{instance=~"$instance"} > bool 0)`, ""}}},
			{kind: graph, title: "Agents, by version", unit: "none", queries: []query{{`count by (version) (meshid_agent_build_info{instance=~"$instance"})`, "{{version}}"}}},
			{kind: graph, title: "Without the CA for", unit: "s", queries: []query{{`topk(10, meshid_agent_ca_unreachable_seconds{instance=~"$instance"})`, "{{instance}}"}}},
			{kind: graph, title: "Streams of workloads and proxies", unit: "none", queries: []query{{of("meshid_agent_streams"), "streams"}, {of("meshid_agent_peer_connections"), "connections"}}},
			{kind: graph, title: "Sessions with the CA that ended, by outcome", unit: "ops", queries: []query{rate("meshid_agent_ca_sessions_total", "outcome")}},
			{kind: graph, title: "Memory", unit: "bytes", queries: []query{{`topk(10, process_resident_memory_bytes{job="meshid-agent",instance=~"$instance"})`, "{{instance}}"}}},
			{kind: graph, title: "Processor time", about: "Cores in use.", unit: "none", queries: []query{{`topk(10, rate(process_cpu_seconds_total{job="meshid-agent",instance=~"$instance"}[$__rate_interval]))`, "{{instance}}"}}},
		},
	},
	{
		name: "ledger", title: "ledger and sinks", program: "ca",
		description: "Is every decision recorded, and does the record reach those who watch?",
		panels: []panel{
			{kind: stat, title: "Records", unit: "none", queries: []query{{of("meshid_ca_ledger_records"), ""}}},
			{kind: stat, title: "Size", unit: "bytes", queries: []query{{of("meshid_ca_ledger_size_bytes"), ""}}},
			{kind: stat, title: "Writable", unit: "bool_yes_no", low: 1, queries: []query{{`min(meshid_ca_ledger_writable{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Failures to write", unit: "none", bad: 1, queries: []query{{of("meshid_ca_ledger_failures_total"), ""}}},
			{kind: stat, title: "Requests that wait", unit: "none", bad: 512, queries: []query{{of("meshid_ca_ledger_queue_requests"), ""}}},
			{kind: stat, title: "Segments", unit: "none", queries: []query{{of("meshid_ca_ledger_segments"), ""}}},
			{kind: stat, title: "Records under a checkpoint", unit: "none", queries: []query{{of("meshid_ca_ledger_tree_size"), ""}}},
			{kind: stat, title: "Checkpoint behind", unit: "s", bad: 60, queries: []query{{`max(time() - meshid_ca_ledger_tree_checkpoint_timestamp_seconds{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Unwitnessed for", unit: "s", bad: 300, queries: []query{{`max(meshid_ca_ledger_tree_unwitnessed_seconds{instance=~"$instance"})`, ""}}},
			{kind: stat, title: "Slowest sink behind", unit: "s", bad: 300, queries: []query{{`max(meshid_ca_ledger_sink_lag_seconds{instance=~"$instance"})`, ""}}},
			{kind: graph, title: "Records a second", unit: "ops", queries: []query{rate("meshid_ca_ledger_records_total", ""), {`sum(rate(meshid_ca_records_aggregated_total{instance=~"$instance"}[$__rate_interval]))`, "counted instead of recorded one by one"}}},
			{kind: graph, title: "Time of an fsync", unit: "s", queries: quantiles("meshid_ca_ledger_fsync_duration_seconds", "")},
			{kind: graph, title: "Sinks: oldest record that waits", unit: "s", queries: []query{{`max by (sink) (meshid_ca_ledger_sink_lag_seconds{instance=~"$instance"})`, "{{sink}}"}}},
			{kind: graph, title: "Sinks: records taken a second", unit: "ops", queries: []query{rate("meshid_ca_ledger_sink_records_total", "sink")}},
			{kind: graph, title: "Sinks: attempts that failed", unit: "ops", queries: []query{rate("meshid_ca_ledger_sink_failures_total", "sink")}},
			{kind: graph, title: "Time to publish a checkpoint", unit: "s", queries: quantiles("meshid_ca_ledger_tree_publish_duration_seconds", "")},
			{kind: graph, title: "Witnesses, by answer", unit: "ops", queries: []query{rate("meshid_ca_ledger_witness_requests_total", "result")}},
		},
	},
}
