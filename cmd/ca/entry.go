package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/goccy/go-yaml"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/diff"
	"github.com/meshid/meshid/pkg/identity"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

func newEntryCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{
		Use:   "entry",
		Short: "Say which workloads have which identity",
		Long: `Registration entries say which workloads, on which nodes, have which SPIFFE ID.

  - name: shop
    spiffe_id: spiffe://example.org/shop/{docker.labels["app"]}
    nodes: node.method == "join_token"
    workloads: docker.labels["team"] == "shop" && docker.image.startsWith("registry.internal/shop/")
    ttl: 1h

"nodes" and "workloads" are CEL expressions over attested attributes (see
docs/entries.md); what stands in {} is one too. One entry covers every container
that it matches, whenever it starts.`,
	}
	c.add(cmd)
	cmd.AddCommand(newEntryApply(c), newEntryDiff(c), newEntryGet(c), newEntryDelete(c), newEntryExplain(c), newEntryStatus(c), newEntryCheck(), newEntryReplay())
	return cmd
}

// trustDomain asks the CA for its trust domain, so that entries are compiled
// here, where their places in the file are known.
func trustDomain(ctx context.Context, c *clientFlags) (spiffeid.TrustDomain, error) {
	s, err := call(ctx, c, adminv1.AdminServiceClient.GetStatus, &adminv1.GetStatusRequest{})
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	return identity.ParseTrustDomain(s.GetTrustDomain())
}

func newEntryApply(c *clientFlags) *cobra.Command {
	var file string
	var dryRun, prune bool
	cmd := printing(&cobra.Command{
		Use:   "apply -f FILE",
		Short: "Create and change entries: all of a file, or none",
		Example: `  ca entry apply -f entries.yaml
  ca entry apply -f entries.d/ --prune`,
		Args: cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (*adminv1.ApplyEntriesResponse, error) {
		return apply(cmd, c, file, dryRun, prune)
	}, func(cmd *cobra.Command, _ string, answer *adminv1.ApplyEntriesResponse) error {
		suffix := ""
		if dryRun {
			suffix = " (dry run)"
		}
		for _, ch := range answer.GetChanges() {
			fmt.Fprintf(cmd.OutOrStdout(), "entry/%s %s%s\n", ch.GetName(), ch.GetAction(), suffix)
		}
		return nil
	}, "text")
	fileFlag(cmd, &file)
	cmd.Flags().BoolVar(&prune, "prune", false, "delete the entries that are not in the file")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would change, and change nothing")
	return cmd
}

func fileFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "file", "f", "", "YAML file, folder of *.yaml files, or - for standard input")
	if err := cmd.MarkFlagRequired("file"); err != nil {
		panic(err) // the flag was defined on the line above
	}
}

func apply(cmd *cobra.Command, c *clientFlags, file string, dryRun, prune bool) (*adminv1.ApplyEntriesResponse, error) {
	td, err := trustDomain(cmd.Context(), c)
	if err != nil {
		return nil, err
	}
	entries, err := readEntries(file, cmd.InOrStdin(), td)
	if err != nil {
		return nil, err
	}
	answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.ApplyEntries,
		&adminv1.ApplyEntriesRequest{Entries: entries, DryRun: dryRun, Prune: prune})
	if h := answer.GetHeld(); h != nil {
		return nil, notDoneYet(h)
	}
	return answer, err
}

func newEntryDiff(c *clientFlags) *cobra.Command {
	var file string
	var prune bool
	cmd := &cobra.Command{
		Use:   "diff -f FILE",
		Short: "Show what apply would change; exit code 1 if anything",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			answer, err := apply(cmd, c, file, true, prune)
			if err != nil {
				return err
			}
			changed := false
			for _, ch := range answer.GetChanges() {
				if ch.GetAction() == "unchanged" {
					continue
				}
				changed = true
				var before, after string
				if ch.GetBefore() != nil {
					before = identity.FormatYAML(ch.GetBefore())
				}
				if ch.GetAfter() != nil {
					after = identity.FormatYAML(ch.GetAfter())
				}
				writeDiff(cmd.OutOrStdout(), ch.GetName(), before, after)
			}
			if changed {
				return &cli.ExitError{Code: 1}
			}
			return nil
		},
	}
	fileFlag(cmd, &file)
	cmd.Flags().BoolVar(&prune, "prune", false, "count entries that are not in the file as deleted")
	return cmd
}

// writeDiff writes the lines that differ between two short texts.
func writeDiff(w io.Writer, name, before, after string) {
	fmt.Fprintln(w, cli.Paint(w, cli.Bold, "entry/"+name))
	for line := range strings.SplitSeq(strings.TrimSuffix(diff.Lines(before, after), "\n"), "\n") {
		switch {
		case strings.HasPrefix(line, "-"):
			line = cli.Paint(w, cli.Red, line)
		case strings.HasPrefix(line, "+"):
			line = cli.Paint(w, cli.Green, line)
		}
		fmt.Fprintln(w, line)
	}
}

func newEntryCheck() *cobra.Command {
	var file, domain string
	cmd := &cobra.Command{
		Use:     "check -f FILE --trust-domain NAME",
		Short:   "Check a file of entries without a running CA",
		Long:    "Check compiles every entry and reports each mistake with its line and column. It needs no CA, so that a build pipeline can run it.",
		Example: "  ca entry check -f entries.yaml --trust-domain example.org",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			td, err := identity.ParseTrustDomain(domain)
			if err != nil {
				return fmt.Errorf("--trust-domain: %w", err)
			}
			entries, err := readEntries(file, cmd.InOrStdin(), td)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%d entries are valid\n", len(entries))
			return nil
		},
	}
	fileFlag(cmd, &file)
	cmd.Flags().StringVar(&domain, "trust-domain", "", "trust domain of the entries")
	if err := cmd.MarkFlagRequired("trust-domain"); err != nil {
		panic(err) // the flag was defined on the line above
	}
	return cmd
}

func newEntryGet(c *clientFlags) *cobra.Command {
	return printing(&cobra.Command{
		Use:               "get [NAME...]",
		Short:             "Show entries",
		ValidArgsFunction: completeArgs(0, c.entryNames),
	}, func(cmd *cobra.Command, names []string) (*adminv1.ListEntriesResponse, error) {
		return call(cmd.Context(), c, adminv1.AdminServiceClient.ListEntries, &adminv1.ListEntriesRequest{Names: names})
	}, func(cmd *cobra.Command, format string, answer *adminv1.ListEntriesResponse) error {
		if format == "yaml" {
			for _, e := range answer.GetEntries() {
				if _, err := io.WriteString(cmd.OutOrStdout(), identity.FormatYAML(e)); err != nil {
					return err
				}
			}
			return nil
		}
		var rows [][]string
		for _, e := range answer.GetEntries() {
			ttl := "default"
			if e.GetTtl() != nil {
				ttl = cli.Short(e.GetTtl().AsDuration())
			}
			rows = append(rows, []string{e.GetName(), e.GetSpiffeId(), ttl, fmt.Sprint(e.GetRevision())})
		}
		return cli.Table(cmd.OutOrStdout(), []string{"NAME", "SPIFFE ID", "TTL", "REVISION"}, rows)
	}, "table", "yaml")
}

func newEntryDelete(c *clientFlags) *cobra.Command {
	var f waitFlags
	cmd := &cobra.Command{
		Use:   "delete NAME...",
		Short: "Delete entries: their identities are withdrawn at once",
		Example: `  ca entry delete shop
  ca entry delete shop --wait`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeArgs(0, c.entryNames),
		RunE: func(cmd *cobra.Command, names []string) error {
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.DeleteEntries, &adminv1.DeleteEntriesRequest{Names: names})
			if err != nil {
				return err
			}
			return f.after(cmd, c, answer, "entry/"+strings.Join(names, " deleted\nentry/")+" deleted\n")
		},
	}
	f.add(cmd)
	return cmd
}

func newEntryExplain(c *clientFlags) *cobra.Command {
	var node, attributes string
	var pid int64
	pod := &podFlags{}
	cmd := printing(&cobra.Command{
		Use:   "explain [NAME...] (--pod NAMESPACE/NAME | --node NODE (--pid PID | --attributes FILE))",
		Short: "Say which entry matches a workload, or which term was false",
		Long: `Explain evaluates the entries against one workload: a pod, by what its cluster says of it
(without what only its node knows, such as users and executables), a process that the
node's agent attests now, or attributes from a file such as

  unix: {uid: 1000, gid: 1000}
  docker:
    image: registry.internal/shop/web:1
    labels: {team: shop, app: web}`,
		Example: `  kubectl -n meshid exec meshid-ca-0 -- ca entry explain --pod shop/web-7d4b9c-x2x8p
  ca entry explain --node web-1 --pid 4711
  ca entry explain shop --node web-1 --attributes web.yaml`,
		ValidArgsFunction: completeArgs(0, c.entryNames),
	}, func(cmd *cobra.Command, names []string) (*adminv1.ExplainResponse, error) {
		request := &adminv1.ExplainRequest{Names: names}
		targets := 0
		for _, given := range []bool{pod.pod != "", pid != 0, attributes != ""} {
			if given {
				targets++
			}
		}
		if targets != 1 {
			return nil, fmt.Errorf("say what to explain: one of --pod, --pid and --attributes")
		}
		if node == "" && pod.pod == "" {
			return nil, fmt.Errorf("say on which node: --node, of those that ca node list shows")
		}
		var hint string
		switch {
		case pod.pod != "":
			w, on, err := pod.find(cmd.Context())
			if err != nil {
				return nil, err
			}
			request.Target = &adminv1.ExplainRequest_Workload{Workload: w}
			if node == "" {
				node, hint = on, "\n  The pod's node has not attested: see that an agent runs there (kubectl get pods -A -o wide -l app.kubernetes.io/name=meshid-agent), or name it with --node if it attests by another method"
			}
		case pid != 0:
			request.Target = &adminv1.ExplainRequest_Pid{Pid: pid}
		default:
			w, err := readAttributes(attributes, cmd.InOrStdin())
			if err != nil {
				return nil, err
			}
			request.Target = &adminv1.ExplainRequest_Workload{Workload: w}
		}
		ids, err := nodeIDs(cmd.Context(), c, []string{node})
		if err != nil {
			return nil, fmt.Errorf("%w%s", err, hint)
		}
		request.Node = &adminv1.ExplainRequest_NodeId{NodeId: ids[0]}
		return call(cmd.Context(), c, adminv1.AdminServiceClient.Explain, request)
	}, func(cmd *cobra.Command, _ string, answer *adminv1.ExplainResponse) error {
		return writeExplanation(cmd.OutOrStdout(), answer)
	}, "text")
	cmd.Flags().StringVar(&node, "node", "", "name or SPIFFE ID of the node (see ca node list)")
	cmd.Flags().Int64Var(&pid, "pid", 0, "process on that node, as numbered on the node itself")
	cmd.Flags().StringVar(&attributes, "attributes", "", "YAML file with attributes, or - for standard input")
	pod.add(cmd)
	_ = cmd.RegisterFlagCompletionFunc("node", completeArgs(0, c.nodeNames))
	return cmd
}

func readAttributes(path string, stdin io.Reader) (*attributesv1.Workload, error) {
	sources, err := entrySources(path, stdin)
	if err != nil {
		return nil, err
	}
	data, err := yaml.YAMLToJSON(sources[0].data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", sources[0].name, err)
	}
	w := &attributesv1.Workload{}
	if err := protojson.Unmarshal(data, w); err != nil {
		return nil, fmt.Errorf("%s: %w\n  See ca entry explain --help for the form", sources[0].name, err)
	}
	return w, nil
}

func writeExplanation(w io.Writer, answer *adminv1.ExplainResponse) error {
	if answer.GetInstance() != "" {
		fmt.Fprintf(w, "instance %s\n", cli.Printable(answer.GetInstance()))
	}
	if answer.GetWorkload() != nil {
		attributes, err := cli.MarshalSet(answer.GetWorkload())
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "attested %s\n", cli.Printable(string(attributes)))
	}
	for _, v := range answer.GetVerdicts() {
		if v.GetMatches() {
			fmt.Fprintf(w, "%s entry/%s -> %s", cli.Paint(w, cli.Green, "match"), v.GetName(), cli.Printable(v.GetSpiffeId()))
			if len(v.GetDnsNames()) > 0 {
				fmt.Fprintf(w, " (%s)", cli.Printable(strings.Join(v.GetDnsNames(), ", ")))
			}
			fmt.Fprintln(w)
			continue
		}
		fmt.Fprintf(w, "%s    entry/%s: %s", cli.Paint(w, cli.Red, "no"), v.GetName(), v.GetField())
		if v.GetTerm() != "" {
			fmt.Fprintf(w, ": %s", cli.Printable(v.GetTerm()))
		}
		fmt.Fprintf(w, ": %s\n", cli.Printable(v.GetWhy()))
	}
	if len(answer.GetVerdicts()) == 0 {
		fmt.Fprintln(w, "there are no entries")
	}
	return nil
}

func newEntryStatus(c *clientFlags) *cobra.Command {
	var out cli.OutputFlag
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say on how many nodes the current entries are in force",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := entryStatus(cmd.Context(), c, wait)
			if err != nil {
				return err
			}
			if format == "json" {
				if err := cli.JSON(cmd.OutOrStdout(), answer); err != nil {
					return err
				}
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "revision %d is in force on %d of %d connected nodes\n",
					answer.GetRevision(), answer.GetNodesInForce(), answer.GetNodesConnected())
				for _, id := range answer.GetLaggards() {
					fmt.Fprintf(cmd.OutOrStdout(), "behind: %s\n", id)
				}
			}
			if wait > 0 && answer.GetNodesInForce() < answer.GetNodesConnected() {
				return &cli.ExitError{Code: 1, Err: fmt.Errorf("not in force everywhere after %v", wait)}
			}
			return nil
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait this long until all connected nodes have them; exit code 1 if not")
	out.Add(cmd, "text", "json")
	return cmd
}

// entryStatus asks until all connected nodes are up to date or wait is over.
func entryStatus(ctx context.Context, c *clientFlags, wait time.Duration) (*adminv1.EntryStatusResponse, error) {
	deadline := time.Now().Add(wait)
	for {
		answer, err := call(ctx, c, adminv1.AdminServiceClient.EntryStatus, &adminv1.EntryStatusRequest{})
		if err != nil || answer.GetNodesInForce() >= answer.GetNodesConnected() || time.Now().After(deadline) {
			return answer, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}
