package main

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/agent"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
)

func newStatusCommand() *cobra.Command {
	socket := os.Getenv("MESHID_AGENT_ADMIN_SOCKET")
	if socket == "" {
		socket = defaultAdminSocket
	}
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the identities on this machine and how the agent is",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			s, err := getStatus(cmd.Context(), socket)
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), s)
			}
			return writeStatus(cmd.OutOrStdout(), s, time.Now())
		},
	}
	cmd.Flags().StringVar(&socket, "admin-socket", socket, "admin socket of the agent (env MESHID_AGENT_ADMIN_SOCKET)")
	out.Add(cmd, "text", "json")
	return cmd
}

func getStatus(ctx context.Context, socket string) (*agent.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := peer.Settle(ctx); err != nil {
		return nil, err
	}
	answer, err := get(ctx, "unix", socket, "http://agent/status")
	if err != nil {
		return nil, fmt.Errorf("reach the agent at %s: %w\n  Is `node-agent run` running, and is this its admin_socket? Only root and the agent's user may use it", socket, err)
	}
	defer answer.Body.Close() //nolint:errcheck // only read from
	if answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 1000)) // as much as there is
		return nil, fmt.Errorf("ask the agent at %s: %s: %s", socket, answer.Status, cli.Printable(cli.Plain(strings.TrimSpace(string(text)))))
	}
	s := &agent.Status{}
	if err := json.NewDecoder(io.LimitReader(answer.Body, 64<<20)).Decode(s); err != nil {
		return nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	return s, nil
}

func writeStatus(w io.Writer, s *agent.Status, now time.Time) error {
	connection := cli.Paint(w, cli.Red, "not connected") + " to the CA"
	if s.Connected {
		connection = cli.Paint(w, cli.Green, "connected") + " to the CA"
	}
	if !s.Since.IsZero() {
		connection += " since " + cli.Short(now.Sub(s.Since))
	}
	if s.LastError != "" && !s.Connected {
		connection += ": " + cli.Printable(cli.Plain(s.LastError))
	}
	fmt.Fprintf(w, "node            %s\nconnection      %s\n", s.NodeID, connection)
	fmt.Fprintf(w, "agent's SVID    expires %s, renewed %s\n", cli.Until(now, s.NotAfter), cli.Until(now, s.RenewAt))
	fmt.Fprintf(w, "entries         %d at revision %d; bundle sequence %d acknowledged by %d of %d streams that carry it\n",
		s.Entries, s.Revision, s.BundleSequence, s.Acknowledged, s.BundleStreams)
	if s.ClockSkewSeconds != nil {
		fmt.Fprintf(w, "clock           %s the CA's\n", agent.SkewText(time.Duration(*s.ClockSkewSeconds*float64(time.Second))))
	}
	budget := "no SVIDs are live"
	if s.OutageBudget != "" {
		budget = s.OutageBudget + " until the first SVID would expire"
	}
	fmt.Fprintf(w, "outage budget   %s\n", budget)
	for _, c := range s.Conditions {
		if c.Severity == health.OK {
			continue
		}
		fmt.Fprintf(w, "condition       %s: %s: %s (since %s)\n", c.Name, cli.Paint(w, cli.Yellow, c.Severity.String()), cli.Printable(cli.Plain(c.Message)), cli.Short(now.Sub(c.Since)))
	}
	fmt.Fprintln(w)
	var rows [][]string
	for _, i := range s.Instances {
		name := i.Instance
		if id, ok := strings.CutPrefix(name, "docker:"); ok && len(id) > 12 {
			name = "docker:" + id[:12] // as the docker command shows it
		}
		if len(i.Identities) == 0 {
			rows = append(rows, []string{name, "(no entry matches)", "-", "-", fmt.Sprint(i.Streams), "-"})
		}
		for _, id := range i.Identities {
			state := id.State
			if id.Reason != "" {
				state += ": " + id.Reason
			}
			rows = append(rows, []string{name, id.SPIFFEID, cli.Until(now, id.NotAfter), cli.Until(now, id.RenewAt), fmt.Sprint(i.Streams), state})
		}
	}
	return cli.Table(w, []string{"INSTANCE", "SPIFFE ID", "EXPIRES", "RENEWED", "STREAMS", "STATE"}, rows)
}

func newFetchCommand() *cobra.Command {
	var socket, write string
	var timeout time.Duration
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "fetch",
		Short: "Fetch the X.509-SVIDs of this very process from the Workload API",
		Long: `Fetch asks the Workload API as any workload does, and shows what it gets: the
identities are those of this process and its user, not of another one.`,
		Example: `  node-agent fetch
  node-agent fetch --write ./svid    # svid.pem, key.pem and bundle.pem`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			name := "SPIFFE_ENDPOINT_SOCKET"
			if cmd.Flags().Changed("socket") {
				name, socket = "--socket", address(socket)
			}
			if err := checkAddress(socket); err != nil {
				return fmt.Errorf("%s is %q: %w\n  Write unix:///path/of/agent.sock", name, socket, err)
			}
			if err := peer.Settle(ctx); err != nil {
				return err
			}
			x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(socket))
			for tries := backoff.New(fetchBackoff); again(err) && backoff.Wait(ctx, tries.Next()) == nil; {
				x, err = workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(socket))
			}
			if err != nil {
				return fetchError(ctx, socket, timeout, err)
			}
			if write != "" {
				return writeFiles(write, x)
			}
			return writeFetched(cmd.OutOrStdout(), format, x)
		},
	}
	// Workload Endpoint §4: what stands there is a URI, never a mere path.
	if socket = os.Getenv("SPIFFE_ENDPOINT_SOCKET"); socket == "" {
		socket = address(defaultSocket)
	}
	cmd.Flags().StringVar(&socket, "socket", socket, "the agent's socket (env SPIFFE_ENDPOINT_SOCKET)")
	cmd.Flags().StringVar(&write, "write", "", "write svid.pem, key.pem (mode 0600) and bundle.pem into this folder")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long to wait for an identity")
	out.Add(cmd, "text", "json")
	return cmd
}

// checkAddress checks the form of an address as Workload Endpoint §4 has it, where
// unix has no authority: unix://agent.sock names a host and no path.
func checkAddress(socket string) error {
	if err := workloadapi.ValidateAddress(socket); err != nil {
		return err
	}
	if u, err := url.Parse(socket); err != nil || u.Scheme == "unix" && u.Host != "" {
		return errors.New("it has no absolute path")
	}
	return nil
}

// fetchBackoff is between the attempts of fetch.
var fetchBackoff = backoff.Policy{Base: 100 * time.Millisecond, Max: time.Second}

// again says whether the agent, which has answered, wants to be asked again.
func again(err error) bool {
	return grpcstatus.Code(err) == codes.Unavailable && !strings.Contains(err.Error(), "dial")
}

// fetchError says what to do about an error of the Workload API.
func fetchError(ctx context.Context, socket string, timeout time.Duration, err error) error {
	switch code := grpcstatus.Code(err); {
	case strings.Contains(err.Error(), "permission denied") && code == codes.Unavailable:
		return fmt.Errorf("fetch from %s: %s\n  Its folders must let this user through", socket, cli.Plain(err.Error()))
	case code == codes.Unavailable && strings.Contains(err.Error(), "dial"):
		return fmt.Errorf("fetch from %s: %s\n  Is `node-agent run` running, and is this its socket? See: node-agent status", socket, cli.Plain(err.Error()))
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.Is(err, context.DeadlineExceeded), code == codes.DeadlineExceeded:
		// The agent may have seen the end of the call first.
		err = fmt.Errorf("no identity within %v: no entry matches this process, or the node has none itself (see node-agent status)", timeout)
	case code == codes.PermissionDenied:
		err = errors.New(grpcstatus.Convert(err).Message()) // it is not a matter of rights
	default:
		return fmt.Errorf("fetch from %s: %s", socket, cli.Plain(err.Error()))
	}
	return fmt.Errorf("fetch from %s: %w\n  To see which entry should match, and why it does not: ca entry explain --node NODE --pid PID", socket, err)
}

// address turns a path into the form that SPIFFE_ENDPOINT_SOCKET has.
func address(socket string) string {
	if strings.Contains(socket, "://") || strings.HasPrefix(socket, "unix:") {
		return socket
	}
	if abs, err := filepath.Abs(socket); err == nil {
		socket = abs
	}
	return "unix://" + socket
}

// fetched is one X.509-SVID, for scripts.
type fetched struct {
	SPIFFEID string    `json:"spiffe_id"`
	Hint     string    `json:"hint,omitempty"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	DNSNames []string  `json:"dns_names,omitempty"`
	Issuer   string    `json:"issuer_key_id"`
}

func writeFetched(w io.Writer, format string, x *workloadapi.X509Context) error {
	list := make([]fetched, 0, len(x.SVIDs))
	for _, s := range x.SVIDs {
		leaf := s.Certificates[0]
		list = append(list, fetched{
			SPIFFEID: s.ID.String(), Hint: s.Hint, Serial: hex.EncodeToString(leaf.SerialNumber.Bytes()),
			NotAfter: leaf.NotAfter, DNSNames: leaf.DNSNames, Issuer: hex.EncodeToString(leaf.AuthorityKeyId),
		})
	}
	if format == "json" {
		return cli.JSON(w, list)
	}
	now := time.Now()
	for _, s := range list {
		fmt.Fprintf(w, "%s\n  serial   %s\n  expires  %s (%s)\n", s.SPIFFEID, s.Serial, cli.Until(now, s.NotAfter), s.NotAfter.Local().Format(time.RFC3339))
		if len(s.DNSNames) > 0 {
			fmt.Fprintf(w, "  dns      %s\n", strings.Join(s.DNSNames, ", "))
		}
	}
	for _, b := range x.Bundles.Bundles() {
		fmt.Fprintf(w, "bundle of %s: %d roots\n", b.TrustDomain(), len(b.X509Authorities()))
	}
	return nil
}

func writeFiles(dir string, x *workloadapi.X509Context) error {
	svid := x.DefaultSVID()
	certificates, key, err := svid.Marshal()
	if err != nil {
		return err
	}
	bundle, err := bundleOf(x, svid)
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return errors.Join(
		durable.WriteFile(filepath.Join(dir, "key.pem"), key, 0o600),
		durable.WriteFile(filepath.Join(dir, "svid.pem"), certificates, 0o644),
		durable.WriteFile(filepath.Join(dir, "bundle.pem"), bundle, 0o644),
	)
}

func bundleOf(x *workloadapi.X509Context, svid *x509svid.SVID) ([]byte, error) {
	b, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, err
	}
	var all []byte
	for _, root := range b.X509Authorities() {
		all = append(all, encode(root)...)
	}
	return all, nil
}

func encode(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}
