// Command node-agent runs once on each machine: it attests the machine to the
// CA, finds out which process asks, and streams keys and certificates to Envoy
// and to workloads, renewing them for as long as they live.
package main

import (
	"os"

	"github.com/meshid/meshid/internal/cli"
)

func main() {
	os.Exit(cli.Main(run))
}
