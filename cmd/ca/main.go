// Command ca is the certificate authority: it issues X.509-SVIDs to the
// workloads that node agents attest, and carries the commands that operate it.
package main

import (
	"os"

	"github.com/meshid/meshid/internal/cli"
)

func main() {
	os.Exit(cli.Main(run))
}
