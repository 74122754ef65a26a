package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/sds/envoycheck"
)

func newCheckEnvoyCommand() *cobra.Command {
	var bootstrap, admin string
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "check-envoy (--bootstrap FILE | --admin ADDRESS)",
		Short: "Say what in an Envoy's configuration would let a withdrawn peer in",
		Long: `Check-envoy reads an Envoy's bootstrap (YAML or JSON), or what a running Envoy's
admin endpoint says of all that is in force (config_dump), and lists what would let
a peer in whose identity was withdrawn: resumed sessions, connections without an
end, roots without names, and so on. Each finding has its place in the document,
why it matters, and the YAML to paste there.

Exit code: 0 nothing found, 1 something found, 2 not checked.`,
		Example: `  node-agent check-envoy --bootstrap /etc/envoy/envoy.yaml
  node-agent check-envoy --admin 127.0.0.1:9901 -o json
  node-agent check-envoy --admin /run/envoy/admin.sock`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, format, err := checkEnvoy(cmd, bootstrap, admin, &out)
			if err == nil {
				err = writeEnvoyReport(cmd.OutOrStdout(), format, report)
			}
			switch {
			case err != nil:
				return &cli.ExitError{Code: 2, Err: fmt.Errorf("error: %w", err)}
			case len(report.Findings) > 0:
				return &cli.ExitError{Code: 1}
			default:
				return nil
			}
		},
	}
	cmd.Flags().StringVar(&bootstrap, "bootstrap", "", "bootstrap to read; - is standard input")
	cmd.Flags().StringVar(&admin, "admin", "", "admin endpoint to ask: host:port, or the path of a socket")
	out.Add(cmd, "text", "json")
	return cmd
}

func checkEnvoy(cmd *cobra.Command, bootstrap, admin string, out *cli.OutputFlag) (*envoycheck.Report, string, error) {
	format, err := out.Format()
	if err != nil {
		return nil, "", err
	}
	var document []byte
	switch {
	case (bootstrap == "") == (admin == ""):
		return nil, "", errors.New("write one of --bootstrap and --admin")
	case admin != "":
		document, err = configDump(cmd.Context(), admin)
	case bootstrap == "-":
		document, err = readDocument(cmd.InOrStdin())
	default:
		var file *os.File
		if file, err = os.Open(bootstrap); err == nil {
			defer file.Close() //nolint:errcheck // only read from
			document, err = readDocument(file)
		}
	}
	if err != nil {
		return nil, "", err
	}
	report, err := envoycheck.Check(document)
	if err != nil {
		return nil, "", fmt.Errorf("check %s: %w", bootstrap+admin, err)
	}
	return report, format, nil
}

func readDocument(r io.Reader) ([]byte, error) {
	return io.ReadAll(io.LimitReader(r, envoycheck.MaxBytes+1)) // one more byte: Check says that it is too long
}

// configDump asks an Envoy for all that it has in force.
func configDump(ctx context.Context, address string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	network, host := "tcp", strings.TrimSuffix(strings.TrimPrefix(address, "http://"), "/")
	if socket := strings.TrimPrefix(address, "unix://"); strings.HasPrefix(socket, "/") || strings.HasPrefix(socket, "@") {
		network, address, host = "unix", socket, "envoy"
	} else {
		address = host
	}
	answer, err := get(ctx, network, address, "http://"+host+"/config_dump")
	if err != nil {
		return nil, fmt.Errorf("reach Envoy's admin endpoint at %s: %w\n  Its address stands in the bootstrap, in admin.address", address, err)
	}
	defer answer.Body.Close() //nolint:errcheck // only read from
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask Envoy at %s for /config_dump: %s", address, answer.Status)
	}
	document, err := readDocument(answer.Body)
	if err != nil {
		return nil, fmt.Errorf("read /config_dump of %s: %w", address, err)
	}
	return document, nil
}

// get asks whoever listens at an address, whatever host the URL names. The caller closes
// the answer's body.
func get(ctx context.Context, network, address, url string) (*http.Response, error) {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
		DisableKeepAlives: true,
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return client.Do(request)
}

func writeEnvoyReport(w io.Writer, format string, r *envoycheck.Report) error {
	if format == "json" {
		return cli.JSON(w, r)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(w, "%s %s\n  at   %s\n  why  %s\n", cli.Paint(w, cli.Red, f.Rule+":"), cli.Printable(f.Problem), cli.Printable(f.Path), f.Why)
		if f.Fix != "" {
			fmt.Fprintf(w, "  fix  %s\n", strings.ReplaceAll(f.Fix, "\n", "\n       "))
		}
		fmt.Fprintln(w)
	}
	_, err := fmt.Fprintf(w, "%d findings; %d downstream and %d upstream TLS contexts checked\n", len(r.Findings), r.Downstreams, r.Upstreams)
	return err
}
