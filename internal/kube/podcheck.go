package kube

import (
	"fmt"
	"time"
)

// CheckPod returns an error if it is known that the pod with a UID was deleted, has
// ended, or is not on that node. A pod that was not heard of yet is no error: whoever
// asks has another reason to believe in it.
func (p *Pods) CheckPod(node, podUID string) error {
	found, was := p.Find(node, podUID)
	switch {
	case found == nil && was:
		return fmt.Errorf("pod %s was deleted", podUID)
	case found == nil:
		return nil
	case found.Node() != node:
		return fmt.Errorf("pod %s is not on node %s", podUID, node)
	case found.Over(time.Now()):
		return fmt.Errorf("pod %s has ended", podUID)
	}
	return nil
}
