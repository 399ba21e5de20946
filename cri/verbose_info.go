package cri

import "encoding/json"

// podInfo and containerInfo are the "info" of the verbose status calls.
type podInfo struct {
	Reason     string     `json:"reason,omitempty"`
	DiskError  string     `json:"diskError,omitempty"`
	Console    string     `json:"console"`
	DataSocket string     `json:"dataSocket"`
	Steps      []stepInfo `json:"steps"`
}

type stepInfo struct {
	Name         string  `json:"name"`
	Milliseconds float64 `json:"milliseconds"`
}

type containerInfo struct {
	SandboxID string `json:"sandboxID"`
}

func verboseInfo(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return map[string]string{"info": string(b)}, nil
}
